// Zero-copy views: what an array over a slot's memory may see, and which arrays are views.
#ifndef KVPAGE_CACHE_VIEWS_H_
#define KVPAGE_CACHE_VIEWS_H_

#include <cstdint>
#include <vector>

#include "cache/parts.h"
#include "cache/patience.h"

namespace kvpage::views {

// An array that a program takes for a view.
struct ViewRef {
  const void* data = nullptr;
  std::int64_t bytes = 0;
};

// Pins what an array over one layer sees (slot -1: all slots): unwritten memory in it reads as zeros.
// Waits for the handlers that run on these slots; a wait that `go_on` ends has changed nothing.
Status Add(const PoolParts& pool, std::int64_t layer, std::int32_t slot, const GoOn& go_on);
void Remove(const PoolParts& pool, std::int32_t slot);
// A program is about to read `arrays` behind `cache`: the cache is not stale, and each array is the memory of one layer
// itself, of all slots or of one that is occupied in the cache. A copy would show what was there when it was made.
Status Check(const PoolParts& pool, const char* op, const CacheRef& cache, const std::vector<ViewRef>& arrays);

}  // namespace kvpage::views

#endif  // KVPAGE_CACHE_VIEWS_H_
