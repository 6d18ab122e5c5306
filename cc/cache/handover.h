// Hands sequences over between processes on one machine: one prefills, another decodes.
//
// Each sequence is sent in a separate file (memory_file.h) that begins with a header (handover_header.h). A slot that
// was acquired for hand-over keeps its blocks in such a file from the start: the file is sealed, and nothing is copied.
// The blocks of any other slot are copied into a new file. The receiver maps full blocks read-only, as it maps shared
// ones, and copies the contents of the last, partial block, so that decoding can continue there.
//
// On a device the file holds only the header, and is accompanied by one driver handle (a file descriptor) per block
// (Vmm::Export). The driver cannot seal memory, so the pool never reuses memory it has handed over, and the sender's
// programs check for themselves what they may no longer write.
//
// A received block has a number in the receiver's pool and counts against its capacity, but uses none of the receiver's
// memory: the memory belongs to the sender. It returns to the system once no process holds the file, the block's
// descriptor or a mapping of it, regardless of which process ends first.
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

// A sequence being handed over.
struct Handover {
  std::shared_ptr<MemoryFile> file;
  Header header;
  std::vector<Fd> handles;  // on a device, [ranges, blocks]
  std::int64_t copied = 0;  // bytes of blocks that were copied into the file
};
using HandoverPtr = std::shared_ptr<const Handover>;

// Acquires slots that each keep their blocks in a separate file.
Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Makes a sealed file of the slot's committed tokens, which programs must have written. If the slot keeps its blocks in
// a file, they become read-only; this waits for programs that use the slot.
Status Export(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, const GoOn& go_on,
              HandoverPtr* out);
// Checks a received file, but not whether it fits a pool. The caller keeps ownership of the descriptors; the file's
// comes first.
Status Receive(const std::vector<int>& descriptors, HandoverPtr* out);
// Maps a sequence into a free slot. claim.slots and claim.tokens say which, and how long it is.
Claim Import(const PoolParts& pool, const Handover& handover, const std::string& fingerprint);
// The program that occupies the slot was not queued.
void UndoImport(const PoolParts& pool, std::int32_t slot);

}  // namespace kvpage::handover

#endif  // KVPAGE_CACHE_HANDOVER_H_
