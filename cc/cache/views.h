// Zero-copy views: what an array over a slot's memory may see.
#ifndef KVPAGE_CACHE_VIEWS_H_
#define KVPAGE_CACHE_VIEWS_H_

#include <cstdint>

#include "cache/parts.h"

namespace kvpage::views {

// Pins what an array over one layer sees (slot -1: all slots): unwritten memory in it reads as zeros.
Status Add(const PoolParts& pool, std::int64_t layer, std::int32_t slot);
void Remove(const PoolParts& pool, std::int32_t slot);

}  // namespace kvpage::views

#endif  // KVPAGE_CACHE_VIEWS_H_
