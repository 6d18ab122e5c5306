// Placing: a sequence that comes from elsewhere (swapped in, or from another process) gets a slot.
#ifndef KVPAGE_CACHE_PLACING_H_
#define KVPAGE_CACHE_PLACING_H_

#include <cstdint>
#include <vector>

#include "cache/parts.h"

namespace kvpage::placing {

// A sequence in memory. Each block has a reference of the caller's.
struct Placed {
  std::vector<std::int32_t> ids;
  std::int32_t space = -1;  // see HostSlot
  std::int64_t prompt = 0;
  std::vector<std::int32_t> blocks;  // [logical blocks, ranges]
};

// A free slot without blocks, in claim.slots.
Claim EmptySlot(const PoolParts& pool, const MappingLock& mapping);
// Maps the sequence into an empty slot, which it then occupies. Blocks that others have too, the prefix index, or a
// sealed file, are read-only. The caller keeps its references. A failure leaves the slot free and empty.
Status Place(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const Placed& placed);
// The slot's occupant, whose program has not run, gives it up.
void Leave(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot);

}  // namespace kvpage::placing

#endif  // KVPAGE_CACHE_PLACING_H_
