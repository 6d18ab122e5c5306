// Zero-copy views: what an array over a slot's memory shows, and which arrays are views.
#ifndef KVPAGE_CACHE_VIEWS_H_
#define KVPAGE_CACHE_VIEWS_H_

#include <cstdint>
#include <vector>

#include "cache/parts.h"
#include "cache/patience.h"

namespace kvpage::views {

// An array that a program uses as a view.
struct ViewRef {
  const void* data = nullptr;
  std::int64_t bytes = 0;
};

// Pins what an array over one layer shows (slot -1: all slots); unwritten memory in it reads as zeros. Waits for the
// handlers that are running on these slots; if `go_on` ends the wait, nothing has changed.
Status Add(const PoolParts& pool, std::int64_t layer, std::int32_t slot, const GoOn& go_on);
void Remove(const PoolParts& pool, std::int32_t slot);
// Called before a program reads `arrays` after `cache`: checks that the cache is not stale, and that each array is the
// memory of one layer itself, of all slots or of one that is occupied in the cache. A copy would show what was there
// when it was made.
Status Check(const PoolParts& pool, const char* op, const CacheRef& cache, const std::vector<ViewRef>& arrays);

}  // namespace kvpage::views

#endif  // KVPAGE_CACHE_VIEWS_H_
