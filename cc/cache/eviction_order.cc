#include "cache/eviction_order.h"

#include <functional>
#include <queue>
#include <unordered_map>

namespace kvpage {

void EvictionOrder::Update(std::int32_t id) {
  PrefixEntry& entry = tree_.entry(id);
  const bool leaf = entry.tokens > 0 && entry.children.empty() && entry.pins == 0;
  if (leaf == entry.listed) return;
  if (leaf) {
    leaves_.emplace(policy_->Value(id), id);
    entry.listed = true;
  } else {
    Leave(id);
  }
}

void EvictionOrder::Touch(std::int32_t id) {
  Leave(id);
  policy_->Touched(id);
  Update(id);
}

void EvictionOrder::Leave(std::int32_t id) {
  PrefixEntry& entry = tree_.entry(id);
  if (entry.listed) leaves_.erase(Rank(policy_->Value(id), id));
  entry.listed = false;
}

std::vector<std::int32_t> EvictionOrder::Plan(std::int64_t enough,
                                              const std::function<std::int64_t(std::int32_t)>& count,
                                              std::int64_t* freed) const {
  std::vector<std::int32_t> plan;
  // Entries all of whose children are planned, and how many children of an entry are.
  std::priority_queue<Rank, std::vector<Rank>, std::greater<>> exposed;
  std::unordered_map<std::int32_t, std::size_t> planned;
  auto next = leaves_.begin();
  *freed = 0;
  while (*freed < enough && (next != leaves_.end() || !exposed.empty())) {
    std::int32_t id;
    if (exposed.empty() || (next != leaves_.end() && *next < exposed.top())) {
      id = (next++)->second;
    } else {
      id = exposed.top().second;
      exposed.pop();
    }
    const std::int64_t blocks = count(id);
    if (blocks < 0) continue;
    *freed += blocks;
    plan.push_back(id);
    const std::int32_t parent = tree_.entry(id).parent;
    const PrefixEntry& before = tree_.entry(parent);
    if (before.tokens > 0 && before.pins == 0 && ++planned[parent] == before.children.size()) {
      exposed.emplace(policy_->Value(parent), parent);
    }
  }
  return plan;
}

}  // namespace kvpage
