// Prefixes between a pool's memory and a store (store/block_store.h): saved for other pools, and loaded from there.
//
// Whole blocks only. No lock of the pool is held while anything is written or read: blocks are copied before they are
// written, and read into blocks that nobody can find yet.
#ifndef KVPAGE_CACHE_PREFIX_STORE_H_
#define KVPAGE_CACHE_PREFIX_STORE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"
#include "cache/patience.h"
#include "store/block_store.h"

namespace kvpage::prefix {

// The blocks of a pool, as stored ones are described.
store::BlockShape StoredShape(const Geometry& geometry);

struct SaveRequest {
  bool all = true;    // everything that the index has; else:
  std::string space;  // of these sequences, whose first tokens are saved if they are in memory
  std::vector<std::vector<std::int32_t>> ids;
};
struct Saved {
  std::int64_t tokens = 0;   // that the store has of what was asked for
  std::int64_t written = 0;  // of these, tokens that it did not have before
};
// Waits for the disk. The first write that fails ends the call; what has been written stays.
Status Save(const PoolParts& pool, store::BlockStore* store, const SaveRequest& request, const GoOn& go_on, Saved* out);

struct Loaded {
  std::int64_t tokens = 0;   // that can be found from now on
  std::int64_t present = 0;  // tokens of a file that were in memory already
  std::int64_t no_room = 0;  // tokens for which there were no free blocks
  std::int64_t lost = 0;     // tokens that could not be read, or those before them
};
// Loads what the store has for the pool while blocks are free: nothing is evicted for it.
Status Load(const PoolParts& pool, store::BlockStore* store, const GoOn& go_on, Loaded* out);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_STORE_H_
