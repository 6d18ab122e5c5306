// The names of the eviction policies (eviction_policy.h), for code that creates a prefix index.
#ifndef KVPAGE_CACHE_PREFIX_POLICY_H_
#define KVPAGE_CACHE_PREFIX_POLICY_H_

namespace kvpage {

enum class PrefixPolicy {
  kLru,           // evicts the least recently used entry first
  kSegmentedLru,  // protects entries that were touched again, up to a share of all entries
  kFrequency,     // the default: recency plus frequency, which is remembered beyond eviction
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_POLICY_H_
