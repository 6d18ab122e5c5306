// Vmm: the page table behind a pool, as a few verbs (create, destroy, map, unmap, fill) over numbered blocks.
//
// Physical memory is a row of equal blocks, each with a handle that exists only between Create and Destroy; virtual
// memory is one reserved range. Everything above (accounting, sharing, reclaim) is platform-free and speaks in block
// numbers and byte offsets only. Unmapped parts of the range are holes and cost no memory. With memfd they read as
// zeros; on a CUDA device nobody may touch them.
//
// Not thread-safe: the pool serialises calls. Mapped addresses may be read and written by other threads meanwhile.
#ifndef KVPAGE_VMM_VMM_H_
#define KVPAGE_VMM_VMM_H_

#include <cstdint>

#include "base/status.h"

namespace kvpage {

class Vmm {
 public:
  virtual ~Vmm() = default;

  // Start of the reserved virtual range.
  virtual char* base() const = 0;

  // Makes block numbers below `num_blocks` valid. Never shrinks: giving memory back is Destroy's work.
  virtual Status Grow(std::int64_t num_blocks) = 0;

  // Allocates the memory of the blocks for real, so that touching it later cannot fail. All or none. With memfd it is
  // zero filled; on a CUDA device it holds anything.
  virtual Status Create(const std::int32_t* blocks, std::int64_t count) = 0;
  // Gives the memory of unmapped blocks back to the system. A block that it fails on keeps its memory; creating it
  // again is harmless.
  virtual Status Destroy(const std::int32_t* blocks, std::int64_t count) = 0;

  // Maps created blocks, one after the other, from `offset` bytes into the range over a hole. All or none. The same
  // block may be mapped at several offsets.
  virtual Status Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) = 0;
  // Turns `count` blocks that are mapped from `offset` on into a hole again; `blocks` as they were given to Map. All or
  // none.
  virtual Status Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) = 0;
  // Moves `count` mapped blocks from one place to another, over a hole; a hole stays behind. All or none.
  virtual Status Move(std::int64_t from, std::int64_t to, const std::int32_t* blocks, std::int64_t count) {
    // At no moment unmapped: putting back cannot fail for want of memory.
    KVPAGE_RETURN_IF_ERROR(Map(to, blocks, count));
    Status status = Unmap(from, blocks, count);
    if (!status.ok()) static_cast<void>(Unmap(to, blocks, count));
    return status;
  }
  // Overwrites mapped memory with one byte value; done when it returns.
  virtual Status Fill(std::int64_t offset, std::int64_t bytes, int byte) = 0;

  // Bytes that the system says are allocated for the blocks.
  virtual std::int64_t PhysicalBytes() const = 0;
  // System (or driver) calls made so far by the verbs above.
  virtual std::int64_t system_calls() const = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_VMM_H_
