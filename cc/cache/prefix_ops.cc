#include "cache/prefix_ops.h"

#include <algorithm>
#include <limits>

#include "cache/prefix_match.h"

namespace kvpage::prefix {
namespace {

// Number of events kept between two calls of Events; about 20 MB with blocks of 64 tokens.
constexpr std::int64_t kMostEvents = 1 << 16;

std::int64_t Length(const TokenIds& ids) { return static_cast<std::int64_t>(ids.size()); }

// Gets the index, brought up to date.
Status OpenIndex(const PoolParts& pool, const MappingLock& mapping, const char* op, PrefixIndex** out) {
  KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), op));
  *out = &pool.supply->OpenIndex(mapping);
  pool.supply->SyncIndex(mapping);
  return {};
}

}  // namespace

Status Find(const PoolParts& pool, const std::string& space, const TokenIds& ids, bool whole, std::int64_t* tokens) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "find_prefix", &index));
  const std::int64_t limit = std::max<std::int64_t>(Length(ids) - (whole ? 0 : 1), 0);
  *tokens = FindHit(pool, mapping, index->Namespace(space), ids.data(), limit).tokens;
  return {};
}

Status Pin(const PoolParts& pool, const std::string& space, const TokenIds& ids, double share, double seconds,
           std::int64_t* tokens) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "pin", &index));
  const double now = Supply::Now();
  index->ExpirePins(now);
  PinOptions options;
  const std::int64_t entries = pool.supply->arena(mapping).pool().budget() / pool.table->geometry().num_ranges();
  options.most_entries = static_cast<std::int64_t>(share * static_cast<double>(entries));
  if (seconds >= 0) options.expires = now + seconds;
  *tokens = index->Pin(index->Namespace(space), ids.data(), Length(ids), options);
  return {};
}

Status Unpin(const PoolParts& pool, const std::string& space, const TokenIds& ids) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "unpin", &index));
  index->Unpin(index->Namespace(space), ids.data(), Length(ids));
  return {};
}

Status Hint(const PoolParts& pool, const std::string& space, const TokenIds& ids, PrefixHint hint) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "hint", &index));
  index->Hint(index->Namespace(space), ids.data(), Length(ids), hint);
  return {};
}

Status Evict(const PoolParts& pool, std::int64_t blocks, std::int64_t* freed) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "evict", &index));
  *freed = pool.supply->Evict(mapping, blocks, /*partial=*/true);
  return {};
}

Status Events(const PoolParts& pool, EventList* out) {
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenIndex(pool, mapping, "events", &index));
  if (!index->recording()) index->RecordEvents(kMostEvents);
  out->events = index->TakeEvents();
  out->spaces = index->Namespaces();
  return {};
}

}  // namespace kvpage::prefix
