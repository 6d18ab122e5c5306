// EvictionPolicy: what an entry of the prefix index is worth. The index evicts leaves only, those with the smallest
// value first, so that a prefix stays as long as something continues it.
#ifndef KVPAGE_CACHE_EVICTION_POLICY_H_
#define KVPAGE_CACHE_EVICTION_POLICY_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache/prefix_policy.h"
#include "cache/prefix_tree.h"

namespace kvpage {

class EvictionPolicy {
 public:
  explicit EvictionPolicy(const PrefixTree& tree) : tree_(tree) {}
  virtual ~EvictionPolicy() = default;

  // A request begins: what it touches and stores is touched at one time.
  void NextRequest() {
    constexpr double kRequest = 1e-6;  // tells requests apart between which nothing is stored
    now_ = static_cast<double>(stored_) + kRequest * static_cast<double>(++requests_);
  }
  void Stored(std::int32_t entry) {
    ++stored_;
    OnStored(entry);
  }
  virtual void OnTouched(std::int32_t entry) = 0;
  // A request asked for a block that has no entry. `hash`: of the prefix that ends with it.
  virtual void OnMissed(std::uint64_t /*hash*/) {}
  // The entry has more or fewer tokens than before.
  virtual void OnResized(std::int32_t /*entry*/) {}
  // The entry is about to be removed.
  virtual void OnRemoved(std::int32_t /*entry*/) {}
  // As if the entry had been touched in the future: it outlives what is touched once while the cache is refilled once.
  virtual void OnRetained(std::int32_t entry) = 0;
  // What the entry is worth, compared with others. Changes with calls that name the entry, and with TakeDemoted.
  virtual double Value(std::int32_t entry) const = 0;
  // An entry that lost value because of another one; kNoEntry: no more of them.
  virtual std::int32_t TakeDemoted() { return kNoEntry; }

 protected:
  virtual void OnStored(std::int32_t entry) = 0;

  // The time is the number of entries stored: entries with equal times belong to one request.
  double now() const { return now_; }
  // How long it takes to store as many entries as there are. The scale of all bonuses, so that they suit any cache.
  double turnover() const { return static_cast<double>(tree_.num_entries()); }
  const PrefixTree& tree() const { return tree_; }
  // The place of an entry in an array that grows with the ids.
  template <class T>
  static T& At(std::vector<T>& values, std::int32_t entry) {
    if (entry >= static_cast<std::int64_t>(values.size())) values.resize(std::max<std::size_t>(64, 2 * entry));
    return values[entry];
  }

 private:
  const PrefixTree& tree_;
  std::int64_t requests_ = 0, stored_ = 0;
  double now_ = 0;
};

std::unique_ptr<EvictionPolicy> MakePolicy(PrefixPolicy kind, const PrefixTree& tree);

// Recency, and frequency that is remembered beyond eviction (frequency_policy.cc).
std::unique_ptr<EvictionPolicy> MakeFrequencyPolicy(const PrefixTree& tree);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_POLICY_H_
