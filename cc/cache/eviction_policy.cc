#include "cache/eviction_policy.h"

#include <set>
#include <utility>

namespace kvpage {
namespace {

// Least recently used.
class Lru final : public EvictionPolicy {
 public:
  using EvictionPolicy::EvictionPolicy;
  void OnTouched(std::int32_t entry) override { At(last_, entry) = now(); }
  void OnRetained(std::int32_t entry) override { At(last_, entry) = now() + turnover(); }
  double Value(std::int32_t entry) const override { return last_[entry]; }

 private:
  void OnStored(std::int32_t entry) override { OnTouched(entry); }

  std::vector<double> last_;
};

// Segmented LRU: entries that were touched again after they were stored are protected, up to a share of all entries.
// Beyond it, the least recently used of them return to the others, as if they had just been touched.
class SegmentedLru final : public EvictionPolicy {
 public:
  using EvictionPolicy::EvictionPolicy;
  void OnTouched(std::int32_t entry) override { Protect(entry, now()); }
  void OnRetained(std::int32_t entry) override { Protect(entry, now() + turnover()); }
  void OnRemoved(std::int32_t entry) override { protected_.erase(Rank(last_[entry], entry)); }
  double Value(std::int32_t entry) const override {
    constexpr double kProtected = 1e15;  // larger than any time
    return last_[entry] + (protected_.count(Rank(last_[entry], entry)) > 0 ? kProtected : 0);
  }
  std::int32_t TakeDemoted() override {
    constexpr double kShare = 0.8;
    if (static_cast<double>(protected_.size()) <= kShare * turnover()) return kNoEntry;
    const std::int32_t entry = protected_.begin()->second;
    protected_.erase(protected_.begin());
    last_[entry] = now();
    return entry;
  }

 private:
  using Rank = std::pair<double, std::int32_t>;  // time of last touch, entry

  void OnStored(std::int32_t entry) override { At(last_, entry) = now(); }
  void Protect(std::int32_t entry, double time) {
    protected_.erase(Rank(last_[entry], entry));
    last_[entry] = time;
    protected_.emplace(time, entry);
  }

  std::vector<double> last_;
  std::set<Rank> protected_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakePolicy(PrefixPolicy kind, const PrefixTree& tree) {
  switch (kind) {
    case PrefixPolicy::kLru:
      return std::make_unique<Lru>(tree);
    case PrefixPolicy::kSegmentedLru:
      return std::make_unique<SegmentedLru>(tree);
    case PrefixPolicy::kFrequency:
      break;
  }
  return MakeFrequencyPolicy(tree);
}

}  // namespace kvpage
