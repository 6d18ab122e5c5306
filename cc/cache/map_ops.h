// map_slots: the one op of a program that maps memory.
#ifndef KVPAGE_CACHE_MAP_OPS_H_
#define KVPAGE_CACHE_MAP_OPS_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::map_ops {

// More tokens than a slot can ever have: that sequence gets ok=false, the others go on.
bool Beyond(const SlotTable& table, std::int32_t tokens);
// Compares what a program wants with its cache value and the table, and sets ok[i] as far as that is known. `enough`:
// nothing needs to be mapped.
Status Check(const PoolParts& pool, const StateLock& state, const char* op, const CacheRef& cache,
             const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok, bool* enough);
// Maps room for tokens[i] tokens in all in slots[i]; where the blocks do not suffice, ok[i] is false.
Status MapSlots(const PoolParts& pool, const char* op, const CacheRef& cache, const std::int32_t* slots,
                const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch);
// The host's share of the checks for a call that the device has already checked, for a cache of generation
// `generation`. Collects releases and sets those ok[i] that can be decided already.
Status CheckOnHost(const PoolParts& pool, const StateLock& state, const char* op, std::int32_t generation,
                   const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok);
// The host's part of map_slots, once the device has checked it: as MapSlots, for a cache of generation `generation`.
Status MapChecked(const PoolParts& pool, const char* op, std::int32_t generation, const std::int32_t* slots,
                  const std::int32_t* tokens, std::int64_t count, bool* ok);

}  // namespace kvpage::map_ops

#endif  // KVPAGE_CACHE_MAP_OPS_H_
