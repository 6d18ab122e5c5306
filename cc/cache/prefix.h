// Prefix: requests that begin with tokens whose keys and values are already in memory (prefix_index.h).
//
// A request gets them in the cheapest possible way. If a parked slot holds them, it is adopted, without mapping or
// copying. Otherwise, the request forks a live sequence. Otherwise, the blocks in the index are mapped in an empty
// slot, and the last, partial one is copied. The queued program (edit_slots) makes this a sequence of that length.
#ifndef KVPAGE_CACHE_PREFIX_H_
#define KVPAGE_CACHE_PREFIX_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::prefix {

struct Request {
  std::vector<std::int32_t> ids;
  std::int64_t tokens = 0;  // room wanted; at least the number of ids
};

struct Options {
  std::string space;       // namespace; sequences are shared only within one namespace
  bool whole = false;      // the last token may be found too; the caller must then get its logits in another way
  std::int64_t unit = 1;   // the number of tokens found is rounded down to a multiple of this
  std::int64_t least = 1;  // finding fewer tokens than this counts as finding none
  bool followers = true;   // see Acquire
};

// Acquires a slot for each request, with the longest prefix that is found. All or nothing.
// claim.tokens: tokens found for each; claim.sources: the donor if it is a fork, else -1; claim.shared: as for Fork.
// claim.leaders: with `followers`, if an earlier request of the same call is about to compute a request's prefix, the
// request gets slot -1, and this is the index of the earlier one; else -1.
Claim Acquire(const PoolParts& pool, const std::vector<Request>& requests, const Options& options);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_H_
