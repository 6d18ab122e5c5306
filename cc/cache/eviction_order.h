// EvictionOrder: the entries of the prefix index that may be evicted next (no entry continues them and no pin holds
// them) in the order of their values, and the choice of the entries to evict.
#ifndef KVPAGE_CACHE_EVICTION_ORDER_H_
#define KVPAGE_CACHE_EVICTION_ORDER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
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
  // The entry gets a child, or is about to be removed.
  void Leave(std::int32_t id);

  // Chooses entries, the least valuable leaves first, until they free `enough` blocks. `count` says how many blocks an
  // entry frees, -1 if it must stay. Entries that free nothing are chosen only where they continue one that
  // frees some.
  std::vector<std::int32_t> Plan(std::int64_t enough, const std::function<std::int64_t(std::int32_t)>& count,
                                 std::int64_t* freed) const;

 private:
  using Rank = std::pair<double, std::int32_t>;  // value, entry

  double Value(std::int32_t id) const;
  // After a change of its value by the policy: lists the entry anew, without a hint to drop it, and the entries that
  // lost value by the change.
  void Revalue(std::int32_t id);

  PrefixTree& tree_;
  const std::unique_ptr<EvictionPolicy> policy_;
  std::set<Rank> leaves_;
  std::vector<double> listed_;  // by entry: the value under which it is in `leaves_`
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_ORDER_H_
