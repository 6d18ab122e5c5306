#include "cache/block_pool.h"

#include <algorithm>
#include <unordered_set>

namespace kvpage {

void BlockPool::PushFront(Kind kind, std::int32_t block) {
  List& list = lists_[kind];
  Block& entry = blocks_[block];
  entry.kind = kind;
  entry.previous = -1;
  entry.next = list.head;
  (list.head >= 0 ? blocks_[list.head].previous : list.tail) = block;
  list.head = block;
  ++list.size;
}

void BlockPool::PushBack(Kind kind, std::int32_t block) {
  List& list = lists_[kind];
  Block& entry = blocks_[block];
  entry.kind = kind;
  entry.next = -1;
  entry.previous = list.tail;
  (list.tail >= 0 ? blocks_[list.tail].next : list.head) = block;
  list.tail = block;
  ++list.size;
}

void BlockPool::Remove(std::int32_t block) {
  Block& entry = blocks_[block];
  List& list = lists_[entry.kind];
  (entry.previous >= 0 ? blocks_[entry.previous].next : list.head) = entry.next;
  (entry.next >= 0 ? blocks_[entry.next].previous : list.tail) = entry.previous;
  entry.previous = entry.next = -1;
  entry.kind = kUsed;
  --list.size;
}

std::int32_t BlockPool::Pick(std::int32_t after) const {
  // Reusing a warm block is cheaper than allocating and zeroing an adjacent one.
  const std::int32_t next = after + 1;
  const bool exists = after >= 0 && next < num_blocks();
  if (exists && blocks_[next].kind == kWarm) return next;
  if (lists_[kWarm].head >= 0) return lists_[kWarm].head;
  return exists && blocks_[next].kind == kCold ? next : lists_[kCold].head;
}

bool BlockPool::Claim(std::int64_t count, std::int32_t after, std::vector<std::int32_t>* blocks,
                      std::vector<std::int32_t>* cold) {
  if (count > num_free()) return false;
  for (std::int64_t i = 0; i < count; ++i) {
    const bool chosen = next_preferred_ < preferred_.size();
    const std::int32_t block = chosen ? preferred_[next_preferred_++] : Pick(after);
    if (blocks_[block].kind == kCold) cold->push_back(block);
    Remove(block);
    blocks_[block].references = 1;
    ++num_used_;
    blocks->push_back(block);
    after = block;
  }
  return true;
}

void BlockPool::Unclaim(const std::vector<std::int32_t>& blocks, const std::vector<std::int32_t>& cold) {
  const std::unordered_set<std::int32_t> was_cold(cold.begin(), cold.end());
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) {
    blocks_[*it].references = 0;
    --num_used_;
    PushFront(was_cold.count(*it) > 0 ? kCold : kWarm, *it);
  }
}

bool BlockPool::ClaimBlock(std::int32_t block, bool* cold) {
  if (num_free() == 0 || !free(block)) return false;
  *cold = blocks_[block].kind == kCold;
  Remove(block);
  blocks_[block].references = 1;
  ++num_used_;
  return true;
}

void BlockPool::Replace(std::int32_t from, std::int32_t to, std::int32_t held) {
  blocks_[to].references = blocks_[from].references;
  blocks_[to].entries = blocks_[from].entries;
  blocks_[from].references = held;
  blocks_[from].entries = 0;
  if (held > 1) ++num_shared_;
  if (held == 0) Free(from);
}

void BlockPool::Release(std::int32_t block) {
  const std::int32_t left = --blocks_[block].references;
  if (left == 1) --num_shared_;
  if (left > 0) return;
  if (!cached(block)) return Free(block);
  ++num_detached_;
}

void BlockPool::SetCached(std::int32_t block) {
  if (++blocks_[block].entries == 1) ++num_cached_;
}

void BlockPool::DropCached(std::int32_t block) {
  if (--blocks_[block].entries > 0) return;
  --num_cached_;
  if (blocks_[block].references > 0) return;
  --num_detached_;
  Free(block);
}

void BlockPool::Free(std::int32_t block) {
  --num_used_;
  if (backing(block) == Backing::kOwn) return PushFront(kWarm, block);
  SetBacking(block, Backing::kOwn);
  PushFront(kCold, block);
  if (on_returned_) on_returned_(block);
}

void BlockPool::SetBacking(std::int32_t block, Backing backing) {
  Backing& now = blocks_[block].backing;
  if (now != Backing::kOwn) --num_backed_[static_cast<int>(now)];
  if (backing != Backing::kOwn) ++num_backed_[static_cast<int>(backing)];
  now = backing;
}

std::vector<std::int32_t> BlockPool::Cool(std::int64_t count) {
  std::vector<std::int32_t> cooled;
  std::int32_t next = lists_[kWarm].tail;  // the least recently used
  while (static_cast<std::int64_t>(cooled.size()) < count && next >= 0) {
    const std::int32_t block = next;
    next = blocks_[block].previous;
    if (readers_.count(block) > 0) continue;
    Remove(block);
    cooled.push_back(block);
  }
  // Sorted, so that adjacent blocks are destroyed by one call and handed out again as neighbours.
  std::sort(cooled.begin(), cooled.end());
  for (auto it = cooled.rbegin(); it != cooled.rend(); ++it) PushFront(kCold, *it);
  return cooled;
}

void BlockPool::SortCold() {
  lists_[kCold] = {};
  for (std::int32_t block = 0; block < num_blocks(); ++block) {
    if (blocks_[block].kind == kCold) PushBack(kCold, block);
  }
}

void BlockPool::CoolBlock(std::int32_t block) {
  Remove(block);
  PushFront(kCold, block);
}

void BlockPool::SetBudget(std::int64_t budget) {
  budget_ = budget;
  while (num_blocks() < budget) {
    blocks_.emplace_back();
    PushBack(kCold, static_cast<std::int32_t>(num_blocks() - 1));
  }
}

}  // namespace kvpage
