// Host calls on the prefix index: find, pin, hint, evict, events.
#ifndef KVPAGE_CACHE_PREFIX_OPS_H_
#define KVPAGE_CACHE_PREFIX_OPS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::prefix {

using TokenIds = std::vector<std::int32_t>;

// Number of tokens that Acquire would find for a request now. Changes nothing.
Status Find(const PoolParts& pool, const std::string& space, const TokenIds& ids, bool whole, std::int64_t* tokens);
// Protects the blocks of the tokens that are found from eviction, for `seconds` (if negative, until Unpin). At most
// `share` of the pool's blocks can be pinned in total. `tokens`: number of tokens pinned.
Status Pin(const PoolParts& pool, const std::string& space, const TokenIds& ids, double share, double seconds,
           std::int64_t* tokens);
Status Unpin(const PoolParts& pool, const std::string& space, const TokenIds& ids);
// Says whether the tokens will be requested again.
Status Hint(const PoolParts& pool, const std::string& space, const TokenIds& ids, PrefixHint hint);
// Makes the index drop entries, the least valuable first, until `blocks` physical blocks have become free, or until
// only entries are left that a live slot maps or a pin holds. Returns the number of blocks freed.
Status Evict(const PoolParts& pool, std::int64_t blocks, std::int64_t* freed);

struct EventList {
  std::vector<PrefixEvent> events;
  std::vector<std::string> spaces;  // names of the namespaces, by number
};
// What the index has stored and removed since the last call (PrefixIndex::TakeEvents). The first call starts recording.
Status Events(const PoolParts& pool, EventList* out);

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_OPS_H_
