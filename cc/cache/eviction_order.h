// EvictionOrder: the entries of the prefix index that may be evicted next (no entry continues them and no pin holds
// them), in the order of their values, with those that are in a store first; and the choice of the entries to evict.
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
  // Updates the entry's place in the order. Must be called when its children, its pins or its value have changed.
  void Update(std::int32_t id);
  // The latest request asked for the entry.
  void Touch(std::int32_t id);
  // Hints. Drop: the entry is evicted before all entries without such a hint, until it is touched. Retain: the entry
  // counts as touched and stays longer.
  void Drop(std::int32_t id);
  void Retain(std::int32_t id);
  // The state of the entry in the store has changed.
  void SetStored(std::int32_t id, StoreState state);
  // Visits entries that are not in the store, in the order of eviction, until visit(entry) returns true.
  template <class Visit>
  void FindUnwritten(const Visit& visit) const {
    const Rank first(true, -std::numeric_limits<double>::infinity(), kNoEntry);
    for (auto at = leaves_.lower_bound(first); at != leaves_.end(); ++at) {
      if (visit(std::get<2>(*at))) return;
    }
  }
  // The entry gets a child or is about to be removed.
  void Leave(std::int32_t id);

  // Chooses entries, the least valuable leaves first, until they free `enough` blocks. `count` returns how many blocks
  // an entry frees, or -1 if it must stay. Entries that free nothing are chosen only if they continue one that frees
  // some.
  std::vector<std::int32_t> Plan(std::int64_t enough, const std::function<std::int64_t(std::int32_t)>& count,
                                 std::int64_t* freed) const;

 private:
  using Rank = std::tuple<bool, double, std::int32_t>;  // whether the store has no copy, value, entry

  Rank RankOf(std::int32_t id) const;
  // Called after the policy has changed the entry's value: updates its place in the order without a drop hint, and the
  // places of entries that lost value because of the change.
  void Revalue(std::int32_t id);

  PrefixTree& tree_;
  const std::unique_ptr<EvictionPolicy> policy_;
  std::set<Rank> leaves_;
  std::vector<Rank> listed_;  // by entry: the rank under which it is in `leaves_`
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_ORDER_H_
