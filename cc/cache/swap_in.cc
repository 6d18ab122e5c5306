// The part of swapping that gives a sequence a slot again.
#include <algorithm>
#include <string>
#include <utility>

#include "cache/swapping.h"

namespace kvpage::swapping {
namespace {

// Whether the sequence is in memory now.
Status Ready(const Swap& swap, bool recover) {
  switch (swap.state()) {
    case SwapState::kWriting:
    case SwapState::kMemory:
      return {};
    case SwapState::kQueued:
      return FailedPrecondition(
          "swap_in: programs that were queued before swap_out have still to run: wait=True waits for them");
    case SwapState::kDisk:
      return FailedPrecondition(
          "swap_in: the sequence is on disk: pool.prefetch(swapped) brings it into memory, wait=True waits for that");
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
  return FailedPrecondition("swap_in: the sequence was swapped in or given up before");
}

// A free slot without blocks.
Claim EmptySlot(const PoolParts& pool, const MappingLock& mapping) {
  Claim claim;
  claim.slots = pool.supply->FewestBlocks(mapping, 1);
  if (claim.slots.empty()) {
    claim.status = ResourceExhausted("no free slot", Reason::kOutOfSlots);
    claim.wanted = 1;
    claim.draining = pool.table->NumDraining(pool.table->Lock());
    return claim;
  }
  claim.status = pool.supply->Empty(mapping, claim.slots[0]);
  return claim;
}

void LeaveSlot(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot) {
  {
    const StateLock state = pool.table->Lock();
    pool.table->StartDraining(state, slot);
    pool.table->Vacate(state, slot);
  }
  pool.supply->SyncIndex(mapping);  // entries for tokens that the slot has not got
  static_cast<void>(pool.supply->Empty(mapping, slot));
}

}  // namespace

Claim In(const PoolParts& pool, const SwapPtr& swap, bool recover) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const std::int64_t ranges = geometry.num_ranges();
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, table.Lock(), "swap_in"); !status.ok()) return FailedClaim(status);
  if (Status status = Ready(*swap, recover); !status.ok()) return FailedClaim(status);
  Claim claim = EmptySlot(pool, mapping);
  if (!claim.status.ok()) return claim;
  const std::int32_t slot = claim.slots[0];
  Arena& arena = pool.supply->arena(mapping);
  if (swap->state() == SwapState::kDamaged) {
    swap->ids.resize(static_cast<std::size_t>(swap->tokens_in_memory()));
    swap->SetTokens(swap->tokens_in_memory());
  }
  const auto tokens = static_cast<std::int64_t>(swap->ids.size());
  const auto count = static_cast<std::int64_t>(swap->blocks.size()) / ranges;
  // What others have as well, or the prefix index, is not this sequence's to write.
  const auto shared = [&](std::int64_t logical) {
    const std::int32_t block = swap->blocks[logical * ranges];
    return arena.pool().references(block) > 1 || arena.pool().cached(block);
  };
  std::int64_t read_only = tokens / geometry.block_tokens;
  while (read_only > 0 && !shared(read_only - 1)) --read_only;
  const bool partial_shared = read_only < count && shared(count - 1);
  const std::int64_t limit = partial_shared ? tokens : read_only * geometry.block_tokens;
  table.OccupySwapped(table.Lock(), slot, swap->ids, swap->space, swap->prompt, limit);
  // A write that goes on copies from blocks which programs may write from now on.
  swap->StopCopies();
  claim.status = pool.supply->Alias(mapping, {{slot, swap->blocks.data(), read_only}});
  if (claim.status.ok()) claim.status = arena.Adopt(slot, swap->blocks.data() + read_only * ranges, count - read_only);
  if (!claim.status.ok()) {
    // Its blocks stay the sequence's: a write that was stopped does not free them.
    if (swap->state() == SwapState::kWriting) swap->SetState(SwapState::kMemory);
    LeaveSlot(pool, mapping, slot);
    claim.slots.clear();
    return claim;
  }
  arena.Drop(swap->blocks);
  swap->blocks.clear();
  if (!partial_shared) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) arena.ZeroTail(slot, layer, tokens);
  }
  pool.supply->swaps(mapping).Remove(swap.get());
  ++pool.supply->swaps(mapping).counts().swapped_in;
  swap->SetState(SwapState::kGone);
  table.Reserve(table.Lock(), slot, tokens);
  claim.tokens = {tokens};
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
  LeaveSlot(pool, mapping, slot);
}

}  // namespace kvpage::swapping
