// PoolParts: the parts of a pool. Each operation of a pool is a function over these, in a file by topic (host_ops,
// capacity, generations, views, inspect, map_ops, program_ops); Pool (pool.h) owns the parts and forwards to the
// functions.
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

// Frees slots whose release has run on the device.
void CollectReleases(const PoolParts& pool, const StateLock& state);

// Publishes the room and blocks of the slots of an applied plan to the mirror; if this fails, undoes the plan.
Status PublishRoom(const PoolParts& pool, const MappingLock& mapping, const SupplyPlan& plan);
// Publishes the current room and blocks of these slots. `stopped`: Mirror::StopReaders has stopped the programs that
// use what changes in them.
Status PublishSlots(const PoolParts& pool, const MappingLock& mapping, const std::vector<std::int32_t>& slots,
                    bool stopped = false);

// Prepares for programs on a device that address blocks by number: opens the block window and gives the mirror the
// block table. Does nothing without a mirror.
Status OpenTable(const PoolParts& pool);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PARTS_H_
