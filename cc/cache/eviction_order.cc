#include "cache/eviction_order.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <unordered_map>
#include <unordered_set>

namespace kvpage {

EvictionOrder::Rank EvictionOrder::RankOf(std::int32_t id) const {
  const PrefixEntry& entry = tree_.entry(id);
  if (entry.dropped) return Rank(false, -std::numeric_limits<double>::infinity(), id);
  // Stores hold full blocks only; a partial block must not protect the blocks before it.
  const bool written = tree_.entry(tree_.Whole(id) ? id : entry.parent).stored == StoreState::kWritten;
  return Rank(!written, policy_->Value(id), id);
}

void EvictionOrder::Update(std::int32_t id) {
  Leave(id);
  PrefixEntry& entry = tree_.entry(id);
  if (entry.tokens == 0 || !entry.children.empty() || entry.pins > 0) return;
  if (id >= static_cast<std::int64_t>(listed_.size())) listed_.resize(std::max<std::size_t>(64, 2 * id));
  listed_[id] = RankOf(id);
  leaves_.insert(listed_[id]);
  entry.listed = true;
}

void EvictionOrder::Revalue(std::int32_t id) {
  tree_.entry(id).dropped = false;
  Update(id);
  for (std::int32_t other; (other = policy_->TakeDemoted()) != kNoEntry;) Update(other);
}

void EvictionOrder::Touch(std::int32_t id) {
  policy_->OnTouched(id);
  Revalue(id);
}

void EvictionOrder::Retain(std::int32_t id) {
  policy_->OnRetained(id);
  Revalue(id);
}

void EvictionOrder::Drop(std::int32_t id) {
  tree_.entry(id).dropped = true;
  Update(id);
}

void EvictionOrder::SetStored(std::int32_t id, StoreState state) {
  tree_.SetStored(id, state);
  Update(id);
  for (const std::int32_t child : tree_.entry(id).children) {
    if (!tree_.Whole(child)) Update(child);
  }
}

void EvictionOrder::Leave(std::int32_t id) {
  PrefixEntry& entry = tree_.entry(id);
  if (entry.listed) leaves_.erase(listed_[id]);
  entry.listed = false;
}

std::vector<std::int32_t> EvictionOrder::Plan(std::int64_t enough,
                                              const std::function<std::int64_t(std::int32_t)>& count,
                                              std::int64_t* freed) const {
  struct Chosen {
    std::int32_t id;
    std::int64_t blocks;
  };
  std::vector<Chosen> chosen;
  // Entries all of whose children are chosen, and the number of chosen children of each entry.
  std::priority_queue<Rank, std::vector<Rank>, std::greater<>> exposed;
  std::unordered_map<std::int32_t, std::size_t> children;
  auto next = leaves_.begin();
  *freed = 0;
  while (*freed < enough && (next != leaves_.end() || !exposed.empty())) {
    std::int32_t id;
    if (exposed.empty() || (next != leaves_.end() && *next < exposed.top())) {
      id = std::get<2>(*next++);
    } else {
      id = std::get<2>(exposed.top());
      exposed.pop();
    }
    const std::int64_t blocks = count(id);
    if (blocks < 0) continue;
    *freed += blocks;
    chosen.push_back({id, blocks});
    const std::int32_t parent = tree_.entry(id).parent;
    const PrefixEntry& before = tree_.entry(parent);
    if (before.tokens > 0 && before.pins == 0 && ++children[parent] == before.children.size()) {
      exposed.push(RankOf(parent));
    }
  }
  // An entry that frees no blocks is evicted only if one of its ancestors is.
  std::vector<std::int32_t> plan;
  std::unordered_set<std::int32_t> planned;
  for (auto each = chosen.rbegin(); each != chosen.rend(); ++each) {
    if (each->blocks == 0 && planned.count(tree_.entry(each->id).parent) == 0) continue;
    planned.insert(each->id);
    plan.push_back(each->id);
  }
  std::reverse(plan.begin(), plan.end());
  return plan;
}

}  // namespace kvpage
