// EvictionPolicy: the value of the entries of the prefix index. The index evicts only leaves, those with the smallest
// value first, so a prefix stays as long as something continues it.
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

  // A request begins: everything that it touches and stores counts as touched at the same time.
  void NextRequest() {
    constexpr double kRequest = 1e-6;  // separates requests between which nothing is stored
    now_ = static_cast<double>(stored_) + kRequest * static_cast<double>(++requests_);
  }
  void Stored(std::int32_t entry) {
    ++stored_;
    OnStored(entry);
  }
  virtual void OnTouched(std::int32_t entry) = 0;
  // A request asked for a block that has no entry. `hash` is the hash of the prefix that ends with this block.
  virtual void OnMissed(std::uint64_t /*hash*/) {}
  // The number of tokens of the entry has changed.
  virtual void OnResized(std::int32_t /*entry*/) {}
  // The entry is about to be removed.
  virtual void OnRemoved(std::int32_t /*entry*/) {}
  // As if the entry had been touched in the future: it outlives entries that are touched once while the cache turns
  // over once.
  virtual void OnRetained(std::int32_t entry) = 0;
  // The value of the entry compared with others. It changes only in calls for this entry and in TakeDemoted.
  virtual double Value(std::int32_t entry) const = 0;
  // Returns an entry that lost value because of another one, or kNoEntry if there are no more.
  virtual std::int32_t TakeDemoted() { return kNoEntry; }

 protected:
  virtual void OnStored(std::int32_t entry) = 0;

  // Time is the number of entries stored so far; entries with equal times belong to the same request.
  double now() const { return now_; }
  // The time in which as many entries are stored as there are now. All bonuses are scaled by it, so that they suit a
  // cache of any size.
  double turnover() const { return static_cast<double>(tree_.num_entries()); }
  const PrefixTree& tree() const { return tree_; }
  // An entry's element in an array that grows with the ids.
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

// Recency plus frequency, which is remembered beyond eviction (frequency_policy.cc).
std::unique_ptr<EvictionPolicy> MakeFrequencyPolicy(const PrefixTree& tree);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_POLICY_H_
