#include "cache/candidates.h"

#include <algorithm>
#include <iterator>

namespace kvpage {

void Candidates::LearnNext() {
  idle_.insert({0, static_cast<std::int32_t>(num_known())});
  standings_.emplace_back();
}

void Candidates::Update(std::int32_t slot, const Standing& now) {
  while (num_known() <= slot) LearnNext();
  Standing& then = standings_[slot];
  if (then.idle && !(now.idle && now.fit == then.fit)) idle_.erase({then.fit, slot});
  if (now.idle) idle_.insert({now.fit, slot});
  if (then.spare > 0 && !(now.spare > 0 && now.order == then.order)) donors_.erase({then.order, slot});
  if (now.spare > 0) donors_.insert({now.order, slot});
  spare_ += now.spare - then.spare;
  draining_ += (now.draining ? now.blocks : 0) - (then.draining ? then.blocks : 0);
  then = now;
}

std::vector<std::int32_t> Candidates::BestFits(const std::vector<std::int64_t>& blocks) {
  std::vector<std::int32_t> slots;
  std::vector<decltype(idle_)::node_type> chosen;  // taken out of the set while the others are chosen
  for (std::int64_t wanted : blocks) {
    // A slot after the known ones is chosen only if all of these are taken: it has no blocks and a higher number.
    if ((idle_.empty() || idle_.rbegin()->first < 0) && num_known() < num_slots_) LearnNext();
    if (idle_.empty()) break;
    // A request for no blocks will grow, so it also prefers a slot with blocks.
    wanted = std::max<std::int64_t>(wanted, 1);
    auto best = idle_.lower_bound({wanted, 0});
    if (best == idle_.end()) best = idle_.lower_bound({idle_.rbegin()->first, 0});
    slots.push_back(best->second);
    chosen.push_back(idle_.extract(best));
  }
  for (auto& node : chosen) idle_.insert(std::move(node));
  return slots;
}

std::vector<std::int32_t> Candidates::FewestBlocks(std::size_t count) {
  std::vector<std::int32_t> slots;
  auto next = idle_.lower_bound({0, 0});
  while (slots.size() < count) {
    if ((next == idle_.end() || next->first > 0) && num_known() < num_slots_) {
      LearnNext();
      slots.push_back(static_cast<std::int32_t>(num_known() - 1));
      continue;
    }
    if (next == idle_.end()) break;
    slots.push_back(next->second);
    ++next;
  }
  // Then the slots that must give up their blocks.
  for (auto last = std::make_reverse_iterator(idle_.lower_bound({0, 0})); last != idle_.rend(); ++last) {
    if (slots.size() == count) break;
    slots.push_back(last->second);
  }
  return slots;
}

}  // namespace kvpage
