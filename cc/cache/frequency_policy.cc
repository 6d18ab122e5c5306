// The default policy: recency plus frequency, which is remembered beyond eviction.
//
// The value of an entry is the time when it was last touched, plus a bonus for how often its tokens were requested,
// minus a penalty for its distance from known tokens when it was stored. Because of the penalty, the first blocks of
// long new prompts, which any hit needs, are kept rather than all blocks of a few prompts. Partial blocks are evicted
// before full ones. The unit is the time in which the cache turns over once. The constants work well on a public trace
// for cache sizes from a fortieth to a tenth of what the trace requests (benchmarks/prefix_hits.py).
#include <algorithm>
#include <cmath>

#include "cache/eviction_policy.h"
#include "cache/ghost_table.h"

namespace kvpage {
namespace {

constexpr double kPerDoubledCount = 0.75;
constexpr double kPerDoubledDistance = 0.25;
constexpr double kDistanceTokens = 512;  // the scale of distances
constexpr std::uint32_t kMostCounted = 8;
constexpr double kLog2[kMostCounted + 1] = {0, 0, 1, 1.585, 2, 2.322, 2.585, 2.807, 3};
constexpr double kPartial = 1;
constexpr std::size_t kGhostsPerEntry = 4;

class Frequency final : public EvictionPolicy {
 public:
  using EvictionPolicy::EvictionPolicy;

  void OnTouched(std::int32_t entry) override {
    Use& use = At(uses_, entry);
    use.count = std::min(use.count + 1, kMostCounted);
    use.distance = 0;
    Assess(entry, 0);
  }
  void OnMissed(std::uint64_t hash) override {
    if (GhostTable::Ghost* const ghost = ghosts_.Find(hash)) ghost->count = std::min(ghost->count + 1, kMostCounted);
  }
  void OnResized(std::int32_t entry) override { Assess(entry, 0); }
  void OnRemoved(std::int32_t entry) override {
    if (tree().Whole(entry)) ghosts_.Put(tree().entry(entry).hash, uses_[entry].count);
  }
  void OnRetained(std::int32_t entry) override { Assess(entry, 1); }
  double Value(std::int32_t entry) const override { return uses_[entry].value; }

 private:
  struct Use {
    double value = 0;
    std::uint32_t count = 0;     // number of requests for it
    std::uint32_t distance = 0;  // when it was stored, tokens between it and previously requested tokens
  };

  void OnStored(std::int32_t entry) override {
    ghosts_.Reserve(kGhostsPerEntry * tree().num_entries());
    Use& use = At(uses_, entry);
    use = Use{0, 1, 0};
    const GhostTable::Ghost* const ghost = tree().Whole(entry) ? ghosts_.Find(tree().entry(entry).hash) : nullptr;
    const std::int32_t parent = tree().entry(entry).parent;
    if (ghost != nullptr) {
      use.count = ghost->count;
    } else if (tree().entry(parent).tokens > 0 && uses_[parent].count == 1) {
      use.distance = uses_[parent].distance + static_cast<std::uint32_t>(tree().block_tokens());
    }
    Assess(entry, 0);
  }
  void Assess(std::int32_t entry, double bonus) {
    Use& use = uses_[entry];
    double worth = bonus + kPerDoubledCount * kLog2[use.count];
    if (use.distance > 0) worth -= kPerDoubledDistance * std::log2(1 + use.distance / kDistanceTokens);
    if (!tree().Whole(entry)) worth -= kPartial;
    use.value = now() + turnover() * worth;
  }

  std::vector<Use> uses_;
  GhostTable ghosts_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeFrequencyPolicy(const PrefixTree& tree) {
  return std::make_unique<Frequency>(tree);
}

}  // namespace kvpage
