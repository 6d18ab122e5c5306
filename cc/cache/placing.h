// Placing: gives a slot to a sequence that comes from elsewhere (swapped in, or from another process).
#ifndef KVPAGE_CACHE_PLACING_H_
#define KVPAGE_CACHE_PLACING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache/parts.h"

namespace kvpage::placing {

// A sequence in memory. The caller has a reference to each block.
struct Placed {
  std::vector<std::int32_t> ids;
  std::int32_t space = -1;  // see HostSlot
  std::int64_t prompt = 0;
  std::vector<std::int32_t> blocks;  // [logical blocks, ranges]
};

// Chooses free slots, those with the fewest blocks, which are cheapest to empty, and empties them; they are in
// claim.slots. If there are not enough, empties none.
Claim EmptySlots(const PoolParts& pool, const MappingLock& mapping, std::size_t count);
// Maps the sequence into an empty slot and occupies it. Blocks used by other slots, by the prefix index or by a sealed
// file are mapped read-only. The caller keeps its references. After a failure the slot is free and empty.
Status Place(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const Placed& placed);
// Undoes Place if the slot's program has not run.
void Leave(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot);

}  // namespace kvpage::placing

#endif  // KVPAGE_CACHE_PLACING_H_
