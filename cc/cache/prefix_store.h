// Saves prefixes from a pool's memory to a store (store/block_store.h) for other pools, and loads them from there.
//
// Only full blocks. No lock of the pool is held during a write or a read: blocks are copied before they are written,
// and read into blocks that nobody can find yet.
#ifndef KVPAGE_CACHE_PREFIX_STORE_H_
#define KVPAGE_CACHE_PREFIX_STORE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"
#include "cache/patience.h"
#include "store/block_store.h"

namespace kvpage::prefix {

// Describes the pool's blocks for a store.
store::BlockShape StoredShape(const Geometry& geometry);

struct SaveRequest {
  bool all = true;    // save everything in the index; otherwise:
  std::string space;  // save the first tokens of these sequences, if they are in memory
  std::vector<std::vector<std::int32_t>> ids;
};
struct Saved {
  std::int64_t tokens = 0;   // requested tokens that are in the store now
  std::int64_t written = 0;  // of these, tokens that were not in it before
};
// Waits for the disk. The first failed write ends the call; what was written before stays.
Status Save(const PoolParts& pool, store::BlockStore* store, const SaveRequest& request, const GoOn& go_on, Saved* out);

struct Loaded {
  std::int64_t tokens = 0;   // that can be found now
  std::int64_t present = 0;  // tokens of a file that were already in memory
  std::int64_t no_room = 0;  // tokens for which there were no free blocks
  std::int64_t lost = 0;     // tokens that could not be read, or that follow such tokens
};
// Loads what the store has for the pool as long as blocks are free; nothing is evicted for it.
Status Load(const PoolParts& pool, store::BlockStore* store, const GoOn& go_on, Loaded* out);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_STORE_H_
