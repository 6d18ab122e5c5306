// The part of swapping that gives a sequence a slot again.
#include <algorithm>
#include <string>
#include <utility>

#include "cache/placing.h"
#include "cache/swapping.h"

namespace kvpage::swapping {
namespace {

// Checks that the sequence is in memory now.
Status Ready(const Swap& swap, bool recover) {
  switch (swap.state()) {
    case SwapState::kWriting:
    case SwapState::kMemory:
      return {};
    case SwapState::kQueued:
      return FailedPrecondition(
          "swap_in: programs that were queued before swap_out have not run yet: wait=True waits for them");
    case SwapState::kStored: {
      const std::shared_ptr<store::SwapStore> store = swap.store.lock();
      const std::string error = swap.error();
      return FailedPrecondition(std::string("swap_in: the sequence is ") +
                                (store == nullptr ? "in a store that is gone" : store->place()) +
                                (error.empty() ? "" : "; " + error) +
                                ": pool.prefetch(swapped) brings it into memory, wait=True waits for that");
    }
    case SwapState::kReading:
      return FailedPrecondition(
          "swap_in: the sequence is still being read: its ticket says when it is ready, wait=True waits for that");
    case SwapState::kDamaged:
      if (recover) return {};
      return FailedPrecondition("swap_in: " + swap.error() +
                                ": recover=True takes these, pool.drop_swapped(swapped) gives the sequence up");
    case SwapState::kGone:
      break;
  }
  return FailedPrecondition("swap_in: the sequence was already swapped in or dropped");
}

}  // namespace

Claim In(const PoolParts& pool, const SwapPtr& swap, bool recover) {
  Poll(pool);
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, pool.table->Lock(), "swap_in"); !status.ok()) return FailedClaim(status);
  if (Status status = Ready(*swap, recover); !status.ok()) return FailedClaim(status);
  Claim claim = placing::EmptySlots(pool, mapping, 1);
  if (!claim.status.ok()) return claim;
  if (swap->state() == SwapState::kDamaged) {
    swap->ids.resize(static_cast<std::size_t>(swap->tokens_in_memory()));
    swap->SetTokens(swap->tokens_in_memory());
  }
  // A write in progress copies from blocks that programs may write from now on.
  swap->StopCopies();
  claim.status = placing::Place(pool, mapping, claim.slots[0], {swap->ids, swap->space, swap->prompt, swap->blocks});
  if (!claim.status.ok()) {
    // The sequence keeps its blocks: a write that was stopped does not free them.
    if (swap->state() == SwapState::kWriting) swap->SetState(SwapState::kMemory);
    claim.slots.clear();
    return claim;
  }
  pool.supply->arena(mapping).Drop(swap->blocks);
  swap->blocks.clear();
  pool.supply->swaps(mapping).Remove(swap.get());
  ++pool.supply->swaps(mapping).counts().swapped_in;
  swap->SetState(SwapState::kGone);
  claim.tokens = {static_cast<std::int64_t>(swap->ids.size())};
  claim.shared = {pool.table->progress(pool.table->Lock()).slots[claim.slots[0]].shared};
  return claim;
}

void UndoIn(const PoolParts& pool, const SwapPtr& swap, std::int32_t slot) {
  const MappingLock mapping = pool.supply->Lock();
  SlotTable& table = *pool.table;
  {
    const StateLock state = table.Lock();
    if (table.closed(state) || table.host(state, slot).state != SlotState::kOccupied) return;
  }
  const std::int64_t ranges = table.geometry().num_ranges();
  Arena& arena = pool.supply->arena(mapping);
  swap->kept = table.geometry().BlocksFor(static_cast<std::int64_t>(swap->ids.size()));
  swap->blocks.assign(arena.map(slot), arena.map(slot) + swap->kept * ranges);
  arena.Hold(swap->blocks);
  pool.supply->swaps(mapping).Add(swap);
  --pool.supply->swaps(mapping).counts().swapped_in;
  swap->SetState(SwapState::kMemory);
  placing::Leave(pool, mapping, slot);
}

}  // namespace kvpage::swapping
