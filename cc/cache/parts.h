// PoolParts: what the verbs of a pool work on. Each verb is a function over these, in a file by topic (host_ops,
// capacity, generations, views, inspect, map_ops, program_ops); Pool (pool.h) owns the parts and forwards.
#ifndef KVPAGE_CACHE_PARTS_H_
#define KVPAGE_CACHE_PARTS_H_

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "cache/mirror.h"
#include "cache/slot_table.h"
#include "cache/supply.h"
#include "cache/types.h"

namespace kvpage {

struct PoolParts {
  PoolOptions options;
  SlotTable* table;
  Supply* supply;
  Mirror* mirror;  // null: programs run on CPU and call the pool as they run
};

// Starts every host call that changes something: checks that the pool is open, collects finished releases, and returns
// a pending device fault.
Status Enter(const PoolParts& pool, const StateLock& state, const char* op);

// Slots whose release has run on the device become free.
void CollectReleases(const PoolParts& pool, const StateLock& state);

// Tells the mirror what room the slots of an applied plan have, and which blocks; undoes the plan when that fails.
Status PublishRoom(const PoolParts& pool, const MappingLock& mapping, const SupplyPlan& plan);
// The same for the current room and blocks of some slots. `stopped`: Mirror::StopReaders has stopped the programs that
// use what changes in them.
Status PublishSlots(const PoolParts& pool, const MappingLock& mapping, const std::vector<std::int32_t>& slots,
                    bool stopped = false);

// Programs on a device address blocks by number from now on: opens the block window, and gives the mirror the block
// table. Nothing happens without a mirror.
Status OpenTable(const PoolParts& pool);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PARTS_H_
