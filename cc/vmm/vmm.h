// Vmm: the page table behind a pool, as four verbs (create, destroy, map, unmap) over numbered blocks.
//
// Physical memory is a row of equal blocks, each with a handle that exists only between Create and Destroy; virtual
// memory is one reserved range. Everything above (accounting, sharing, reclaim) is platform-free and speaks in block
// numbers and byte offsets only. Unmapped parts of the range are holes: they read as zeros and cost no memory.
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

  // Allocates the memory of the blocks for real, so that touching it later cannot fail; zero filled. All or none.
  virtual Status Create(const std::int32_t* blocks, std::int64_t count) = 0;
  // Gives the memory of unmapped blocks back to the system.
  virtual Status Destroy(const std::int32_t* blocks, std::int64_t count) = 0;

  // Maps created blocks, one after the other, from `offset` bytes into the range over a hole. All or none. The same
  // block may be mapped at several offsets.
  virtual Status Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) = 0;
  // Turns `count` mapped blocks from `offset` on into a hole again.
  virtual Status Unmap(std::int64_t offset, std::int64_t count) = 0;
  // Moves `count` mapped blocks from one place to another, over a hole; a hole stays behind. All or none.
  virtual Status Move(std::int64_t from, std::int64_t to, const std::int32_t* blocks, std::int64_t count) {
    KVPAGE_RETURN_IF_ERROR(Unmap(from, count));
    Status status = Map(to, blocks, count);
    if (!status.ok()) static_cast<void>(Map(from, blocks, count));
    return status;
  }

  // Bytes that the system says are allocated for the blocks.
  virtual std::int64_t PhysicalBytes() const = 0;
  // System (or driver) calls made so far by the verbs above.
  virtual std::int64_t system_calls() const = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_VMM_H_
