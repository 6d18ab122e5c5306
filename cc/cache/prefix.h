// Prefix: requests that begin with tokens whose keys and values are in memory already (prefix_index.h).
//
// A request gets them in the cheapest way there is: the parked slot that holds them is adopted, with no mapping and no
// copy; else it forks a live sequence; else the blocks that the index refers to are mapped in an empty slot, and the
// last, partial one is copied. Its queued program (edit_slots) makes it a sequence of that length.
#ifndef KVPAGE_CACHE_PREFIX_H_
#define KVPAGE_CACHE_PREFIX_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::prefix {

struct Request {
  std::vector<std::int32_t> ids;
  std::int64_t tokens = 0;  // room wanted; at least that of the ids
};

struct Options {
  std::string space;       // namespace: sequences of different ones are never shared
  bool whole = false;      // the last token may be found too; its logits are then the caller's problem
  std::int64_t unit = 1;   // what is found is cut down to a multiple of this
  std::int64_t least = 1;  // fewer tokens than this are not worth taking
  bool followers = true;   // see Acquire
};

// A slot for each request, with the longest prefix that is found. All or nothing.
// claim.tokens: what each has; claim.sources: the donor of a fork, else -1; claim.shared: as Fork has it.
// claim.leaders: with `followers`, a request whose prefix an earlier one of the same call is about to compute gets slot
// -1, and the number of that request here; else -1.
Claim Acquire(const PoolParts& pool, const std::vector<Request>& requests, const Options& options);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_H_
