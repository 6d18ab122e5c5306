// The host verbs that change how much memory a pool has: trim and resize.
#ifndef KVPAGE_CACHE_CAPACITY_H_
#define KVPAGE_CACHE_CAPACITY_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::capacity {

// Gives unneeded memory back to the system; `freed_blocks`: how many physical blocks that were.
Status Trim(const PoolParts& pool, std::int64_t* freed_blocks);
// Changes the budget; parked blocks are given up where it shrinks.
Claim Resize(const PoolParts& pool, std::int64_t capacity_bytes);

}  // namespace kvpage::capacity

#endif  // KVPAGE_CACHE_CAPACITY_H_
