// Helpers shared by saving (prefix_save.cc) and loading (prefix_load.cc).
#ifndef KVPAGE_CACHE_PREFIX_STORE_PARTS_H_
#define KVPAGE_CACHE_PREFIX_STORE_PARTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::prefix {

// How long to wait for the store before asking the caller whether to continue.
constexpr double kStoreWaitSeconds = 0.1;

inline Status Interrupted(const char* op) {
  return FailedPrecondition(std::string(op) + ": interrupted while it waited for the store");
}

inline Status CheckPlatform(const PoolParts& pool, const char* op) {
  if (pool.mirror == nullptr) return {};
  return {Code::kUnimplemented, std::string(op) + ": pools on CPU only"};
}

// Gets the index, brought up to date, and makes the block window available.
inline Status OpenStoredIndex(const PoolParts& pool, const MappingLock& mapping, const char* op, PrefixIndex** index) {
  KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), op));
  KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).OpenWindow());
  *index = &pool.supply->OpenIndex(mapping);
  pool.supply->SyncIndex(mapping);
  return {};
}

// The same for threads that are not in one of the pool's own calls; only those report a pending device fault.
inline Status OpenIndexForThread(const PoolParts& pool, const MappingLock& mapping, const char* op,
                                 PrefixIndex** index) {
  {
    const StateLock state = pool.table->Lock();
    KVPAGE_RETURN_IF_ERROR(pool.table->CheckOpen(state, op));
    CollectReleases(pool, state);
  }
  KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).OpenWindow());
  *index = &pool.supply->OpenIndex(mapping);
  pool.supply->SyncIndex(mapping);
  return {};
}

// Copies full blocks of a sequence, from *copied to `stop`, up to the first one that is not in memory or not written
// yet. `out`: [blocks, ranges, block_bytes]. Holds the mapping mutex while copying.
Status CopyBlocks(const PoolParts& pool, const char* op, const std::string& space,
                  const std::vector<std::int32_t>& tokens, std::int64_t stop, char* out, std::int64_t* copied);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_STORE_PARTS_H_
