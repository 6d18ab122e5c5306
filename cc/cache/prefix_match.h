// Turns a PrefixMatch into a Hit: how much of what the prefix index finds a request can get, and from where.
#ifndef KVPAGE_CACHE_PREFIX_MATCH_H_
#define KVPAGE_CACHE_PREFIX_MATCH_H_

#include <cstdint>
#include <vector>

#include "cache/parts.h"

namespace kvpage::prefix {

// What a request gets, and from where.
struct Hit {
  enum Kind { kNone, kAdopt, kFork, kAlias } kind = kNone;
  std::int64_t tokens = 0;
  std::int32_t slot = -1;            // the request's slot; FindHit sets it to the free slot that has the tokens, or -1
  std::int32_t source = -1;          // kFork: the donor
  std::vector<std::int32_t> blocks;  // kAlias: the blocks of the tokens, [logical blocks, ranges]
  std::int32_t leader = -1;          // the earlier request that this one waits for
};

// Whether the entries of this owner (or of none) are written up to a token.
bool Written(const PoolParts& pool, const StateLock& state, std::int32_t owner, std::int64_t tokens);

// The longest prefix of the first `limit` ids whose keys and values are available (kAlias), or will be when a program
// that is queued now runs (kFork). The index must be up to date (Supply::SyncIndex).
Hit FindHit(const PoolParts& pool, const MappingLock& mapping, std::int32_t space, const std::int32_t* ids,
            std::int64_t limit);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_MATCH_H_
