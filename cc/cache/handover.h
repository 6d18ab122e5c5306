// Handing sequences over between processes of one machine: one prefills, another decodes.
//
// Each sequence is sent in a separate file (memory_file.h) that begins with a header (handover_header.h). A slot that
// was acquired for hand-over keeps its blocks in such a file from the start: the file is sealed, and nothing is copied.
// The blocks of any other slot are copied into a new file. The receiver maps whole blocks read-only, as it maps shared
// ones, and copies the contents of the last, partial block, so that decoding can go on there.
//
// On a device the file has only the header, and a descriptor of the driver's goes with it for each block (Vmm::Export).
// Nothing else changes, but that the driver has no seals: the pool never uses memory again that it has handed over, and
// what the sender's programs may not write any more is checked by the programs themselves.
//
// A received block has a number in the receiver's pool and counts in its capacity, but takes none of its memory: the
// memory is the sender's. The system gets it back when no process has the file any more, or the block's descriptor or
// mapping, whoever ends first.
#ifndef KVPAGE_CACHE_HANDOVER_H_
#define KVPAGE_CACHE_HANDOVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "cache/handover_header.h"
#include "cache/parts.h"
#include "cache/patience.h"

namespace kvpage::handover {

// A sequence in transit.
struct Handover {
  std::shared_ptr<MemoryFile> file;
  Header header;
  std::vector<Fd> handles;  // on a device, [ranges, blocks]
  std::int64_t copied = 0;  // bytes of blocks that were copied into the file
};
using HandoverPtr = std::shared_ptr<const Handover>;

// Acquires slots that each keep their blocks in a separate file.
Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Makes a sealed file of the slot's committed tokens, which programs must have written. If the slot has a file, its
// blocks may only be read from then on; this waits for programs that run on it.
Status Export(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, const GoOn& go_on,
              HandoverPtr* out);
// Checks a file that was received, apart from whether it fits a pool. The descriptors, the file's first, stay the
// caller's.
Status Receive(const std::vector<int>& descriptors, HandoverPtr* out);
// Maps a sequence into a free slot. claim.slots and claim.tokens say which, and how long it is.
Claim Import(const PoolParts& pool, const Handover& handover, const std::string& fingerprint);
// The program that occupies the slot was not queued.
void UndoImport(const PoolParts& pool, std::int32_t slot);

}  // namespace kvpage::handover

#endif  // KVPAGE_CACHE_HANDOVER_H_
