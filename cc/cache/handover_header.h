// The beginning of a file that holds one sequence for another process (memory_file.h).
//
//   bytes 0..7    "KVPAGEHO"
//   8..11         version, uint32
//   12..15        crc32c of everything after it, up to the end of the token ids
//   16..63        int64: offset of the blocks, tokens, blocks per range, block stride between ranges, bytes per block,
//                 ranges
//   64..71        uint32: bytes of the shape, bytes of the fingerprint
//   72..          shape, fingerprint (text), token ids (int32)
//
// Numbers are little-endian. Block b of range r is (r * stride + b) blocks after that offset. The blocks themselves
// have no checksum: the file is sealed, so it is what the sender wrote.
//
// For a sequence in device memory, the file holds only this header. The stride is 0, and the shape is followed by the
// text " memory=" and the device's name. The file is accompanied by blocks * ranges descriptors, grouped by range.
#ifndef KVPAGE_CACHE_HANDOVER_HEADER_H_
#define KVPAGE_CACHE_HANDOVER_HEADER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache/geometry.h"
#include "vmm/memory_file.h"

namespace kvpage::handover {

// The maximum size of a header, so that a receiver cannot be made to read a file of any size.
constexpr std::int64_t kMaxFingerprint = 1024;

struct Header {
  std::int64_t begin = 0, tokens = 0, blocks = 0, stride = 0, block_bytes = 0, ranges = 0;
  std::string shape;        // of the pool: see ShapeOf
  std::string memory;       // from Vmm::MemoryName; empty: the blocks are in the file
  std::string fingerprint;  // identifies the model; set by the caller
  std::vector<std::int32_t> ids;

  std::int64_t Offset(std::int64_t range, std::int64_t block) const {
    return begin + (range * stride + block) * block_bytes;
  }
  std::int64_t file_bytes() const { return Offset(ranges, 0); }
  std::int64_t num_handles() const { return memory.empty() ? 0 : blocks * ranges; }
};

// Describes, as text, what two pools must have in common to exchange blocks.
std::string ShapeOf(const Geometry& geometry);
// Offset of the first block in the file of a sequence of at most this many tokens.
std::int64_t HeaderBytes(std::int64_t tokens);

Status WriteHeader(const Header& header, MemoryFile* file);
// Checks that the file matches its header, and reads the header.
Status ReadHeader(const MemoryFile& file, Header* out);
// Checks that the sequence fits a pool whose memory has this name.
Status CheckFits(const Header& header, const Geometry& geometry, const std::string& memory,
                 const std::string& fingerprint);

}  // namespace kvpage::handover

#endif  // KVPAGE_CACHE_HANDOVER_HEADER_H_
