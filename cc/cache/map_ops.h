// map_slots: the only op by which programs map memory.
#ifndef KVPAGE_CACHE_MAP_OPS_H_
#define KVPAGE_CACHE_MAP_OPS_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::map_ops {

// Whether a slot can never have this many tokens: its sequence gets ok=false, and the others continue.
bool Beyond(const SlotTable& table, std::int32_t tokens);
// Compares a program's request with its cache value and the table, and sets those ok[i] that can be decided already.
// `enough`: nothing needs to be mapped.
Status Check(const PoolParts& pool, const StateLock& state, const char* op, const CacheRef& cache,
             const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok, bool* enough);
// Maps room for a total of tokens[i] tokens in slots[i]; ok[i] is false if there are not enough blocks.
Status MapSlots(const PoolParts& pool, const char* op, const CacheRef& cache, const std::int32_t* slots,
                const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch);
// The host's share of the checks for a call that the device has already checked, for a cache of generation
// `generation`. Collects releases and sets those ok[i] that can be decided already.
Status CheckOnHost(const PoolParts& pool, const StateLock& state, const char* op, std::int32_t generation,
                   const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok);
// The host's part of map_slots after the device's check: like MapSlots, for a cache of generation `generation`.
Status MapChecked(const PoolParts& pool, const char* op, std::int32_t generation, const std::int32_t* slots,
                  const std::int32_t* tokens, std::int64_t count, bool* ok);

}  // namespace kvpage::map_ops

#endif  // KVPAGE_CACHE_MAP_OPS_H_
