#include "cache/swap_table.h"

#include <algorithm>

namespace kvpage {

void SwapTable::Remove(const Swap* swap) {
  const auto same = [&](const SwapPtr& each) { return each.get() == swap; };
  swaps_.erase(std::remove_if(swaps_.begin(), swaps_.end(), same), swaps_.end());
}

SwapPtr SwapTable::Queued(std::int32_t slot) const {
  for (const SwapPtr& swap : swaps_) {
    if (swap->slot == slot && swap->state() == SwapState::kQueued) return swap;
  }
  return nullptr;
}

SwapTable::Blocks SwapTable::FindBlocks(std::int64_t ranges) const {
  Blocks found;
  for (const SwapPtr& swap : swaps_) {
    const bool writing = swap->state() == SwapState::kWriting;
    for (std::size_t i = 0; i < swap->blocks.size(); ++i) {
      const std::int32_t block = swap->blocks[i];
      if (block < 0) continue;
      const bool goes = writing && static_cast<std::int64_t>(i) >= swap->kept * ranges;
      (goes ? found.writing : found.held).push_back(block);
    }
  }
  return found;
}

std::int64_t SwapTable::CountWriting(const Arena& arena) const {
  if (swaps_.empty()) return 0;
  const BlockPool& pool = arena.pool();
  const std::vector<std::int32_t> writing = FindBlocks(arena.geometry().num_ranges()).writing;
  return std::count_if(writing.begin(), writing.end(),
                       [&](std::int32_t block) { return pool.references(block) == 1 && !pool.cached(block); });
}

}  // namespace kvpage
