// The host calls that change how much memory a pool has: trim and resize.
#ifndef KVPAGE_CACHE_CAPACITY_H_
#define KVPAGE_CACHE_CAPACITY_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::capacity {

// Returns unneeded memory to the system; `freed_blocks` is the number of physical blocks freed.
Status Trim(const PoolParts& pool, std::int64_t* freed_blocks);
// Changes the budget; if it shrinks, parked blocks are given up.
Claim Resize(const PoolParts& pool, std::int64_t capacity_bytes);

}  // namespace kvpage::capacity

#endif  // KVPAGE_CACHE_CAPACITY_H_
