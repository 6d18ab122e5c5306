// The part of Supply for sequences that are swapped out and in: see swapping.h.
#include <algorithm>
#include <string>

#include "cache/supply.h"

namespace kvpage {

void Supply::FinishSwaps(const MappingLock& lock) {
  if (emptying_.empty()) return;
  std::vector<std::int32_t> free;
  const auto finished = [&](std::int32_t slot) {
    const StateLock state = table_->Lock();
    if (table_->progress(state).slots[slot].pins > 0 || table_->host(state, slot).views > 0) return false;
    table_->EndSwap(state, slot);
    free.push_back(slot);
    return true;
  };
  emptying_.erase(std::remove_if(emptying_.begin(), emptying_.end(), finished), emptying_.end());
  if (free.empty()) return;
  SyncIndex(lock);  // with what programs have written, as for any slot that becomes free
  // A slot that cannot be emptied now is not adopted before it is (DropShared).
  for (const std::int32_t slot : free) static_cast<void>(Empty(lock, slot));
}

Claim Supply::FreeBlocks(const MappingLock& lock, std::int64_t count) {
  Claim claim;
  claim.wanted = count;
  if (count == 0) return claim;
  Refresh(lock);
  const std::int64_t short_of = count - arena_->pool().num_free();
  if (short_of <= 0) return claim;
  Tally(lock, {}, &claim);
  if (short_of <= claim.reclaimable) {
    claim.status = Reclaim(lock, short_of);
    return claim;
  }
  claim.status = ResourceExhausted(std::to_string(count) + " blocks wanted, " + std::to_string(claim.free) + " free, " +
                                       std::to_string(claim.reclaimable) + " reclaimable, " +
                                       std::to_string(claim.draining) + " draining",
                                   Reason::kOutOfBlocks);
  return claim;
}

Claim Supply::ClaimBlocks(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks) {
  Claim claim = FreeBlocks(lock, count);
  if (!claim.status.ok() || count == 0) return claim;
  claim.status = arena_->Claim(count, blocks);
  if (claim.status.code() == Code::kResourceExhausted) Tally(lock, {}, &claim);
  return claim;
}

Claim Supply::ClaimNumbers(const MappingLock& lock, std::int64_t count, std::vector<std::int32_t>* blocks) {
  Claim claim = FreeBlocks(lock, count);
  if (!claim.status.ok() || count == 0) return claim;
  // In the window, each may be between blocks of the pool's own file.
  claim.status = PromiseAliases(lock, Arena::kSplits * count);
  if (claim.status.ok()) claim.status = arena_->ClaimNumbers(count, blocks);
  return claim;
}

}  // namespace kvpage
