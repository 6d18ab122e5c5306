// The names of the eviction policies (eviction_policy.h), for those who make a prefix index.
#ifndef KVPAGE_CACHE_PREFIX_POLICY_H_
#define KVPAGE_CACHE_PREFIX_POLICY_H_

namespace kvpage {

enum class PrefixPolicy {
  kLru,           // the least recently used goes first
  kSegmentedLru,  // what was touched again is protected, up to a share of the entries
  kFrequency,     // the default: recency, and frequency that is remembered beyond eviction
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PREFIX_POLICY_H_
