// EvictionOrder: the entries of the prefix index that may be evicted next (no entry continues them and no pin holds
// them), those first that a store has, each in the order of their values; and the choice of the entries to evict.
#ifndef KVPAGE_CACHE_EVICTION_ORDER_H_
#define KVPAGE_CACHE_EVICTION_ORDER_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "cache/eviction_policy.h"
#include "cache/prefix_tree.h"

namespace kvpage {

class EvictionOrder {
 public:
  EvictionOrder(PrefixTree* tree, std::unique_ptr<EvictionPolicy> policy) : tree_(*tree), policy_(std::move(policy)) {}

  EvictionPolicy& policy() { return *policy_; }
  // Lists the entry where it belongs now. To be called when its children, its pins or its value have changed.
  void Update(std::int32_t id);
  // The request that began last asked for the entry.
  void Touch(std::int32_t id);
  // Hints: the entry goes before all that have no such hint, until it is touched; or it counts as touched and
  // stays longer.
  void Drop(std::int32_t id);
  void Retain(std::int32_t id);
  // What the store has of the entry has changed.
  void SetStored(std::int32_t id, StoreState state);
  // Visits entries that the store does not have, in the order in which they would go, until visit(entry) is true.
  template <class Visit>
  void FindUnwritten(const Visit& visit) const {
    const Rank first(true, -std::numeric_limits<double>::infinity(), kNoEntry);
    for (auto at = leaves_.lower_bound(first); at != leaves_.end(); ++at) {
      if (visit(std::get<2>(*at))) return;
    }
  }
  // The entry gets a child, or is about to be removed.
  void Leave(std::int32_t id);

  // Chooses entries, the least valuable leaves first, until they free `enough` blocks. `count` says how many blocks an
  // entry frees, -1 if it must stay. Entries that free nothing are chosen only where they continue one that
  // frees some.
  std::vector<std::int32_t> Plan(std::int64_t enough, const std::function<std::int64_t(std::int32_t)>& count,
                                 std::int64_t* freed) const;

 private:
  using Rank = std::tuple<bool, double, std::int32_t>;  // whether the store has no copy, value, entry

  Rank RankOf(std::int32_t id) const;
  // After a change of its value by the policy: lists the entry anew, without a hint to drop it, and the entries that
  // lost value by the change.
  void Revalue(std::int32_t id);

  PrefixTree& tree_;
  const std::unique_ptr<EvictionPolicy> policy_;
  std::set<Rank> leaves_;
  std::vector<Rank> listed_;  // by entry: the rank under which it is in `leaves_`
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_ORDER_H_
