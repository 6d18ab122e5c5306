#include "cache/swap_steps.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache/swap_copies.h"

namespace kvpage::swapping::steps {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

void Release(const PoolParts& pool, const MappingLock& mapping, std::vector<std::int32_t> blocks) {
  blocks.erase(std::remove(blocks.begin(), blocks.end(), -1), blocks.end());
  pool.supply->arena(mapping).Drop(blocks);
}

// Frees the blocks that are not kept in memory.
void ReleaseStored(const PoolParts& pool, const MappingLock& mapping, Swap* swap) {
  const auto begin = swap->blocks.begin() + swap->kept * pool.table->geometry().num_ranges();
  Release(pool, mapping, {begin, swap->blocks.end()});
  std::fill(begin, swap->blocks.end(), -1);
}

}  // namespace

bool Vacated(const PoolParts& pool, const Swap& swap) {
  return pool.table->progress(pool.table->Lock()).slots[swap.slot].vacated;
}

bool Idle(const PoolParts& pool, const Swap& swap) {
  const StateLock state = pool.table->Lock();
  const SlotProgress& slot = pool.table->progress(state).slots[swap.slot];
  return slot.vacated && slot.pins == 0 && pool.table->host(state, swap.slot).views == 0;
}

void Find(const PoolParts& pool, const MappingLock& mapping, Swap* swap) {
  const Geometry& geometry = pool.table->geometry();
  const Arena& arena = pool.supply->arena(mapping);
  const std::int64_t ranges = geometry.num_ranges();
  {
    const StateLock state = pool.table->Lock();
    const HostSlot& row = pool.table->host(state, swap->slot);
    swap->ids = row.committed;
    swap->space = row.space;
    swap->prompt = row.prompt;
  }
  const std::int64_t count =
      std::min(geometry.BlocksFor(static_cast<std::int64_t>(swap->ids.size())), arena.blocks(swap->slot));
  const std::int32_t* const map = arena.map(swap->slot);
  swap->blocks.assign(map, map + count * ranges);
  swap->kept = count;
  while (swap->kept > 0 && arena.pool().references(map[(swap->kept - 1) * ranges]) == 1) --swap->kept;
}

void Limit(const PoolParts& pool, std::int64_t tokens, std::int64_t kept, Swap* swap) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  swap->ids.resize(static_cast<std::size_t>(std::min<std::int64_t>(tokens, swap->ids.size())));
  const std::int64_t count = std::min<std::int64_t>(geometry.BlocksFor(tokens), swap->blocks.size() / ranges);
  swap->blocks.resize(static_cast<std::size_t>(count * ranges));
  swap->kept = std::min(std::max(swap->kept, kept), count);
}

bool Take(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap) {
  swap->SetTokens(static_cast<std::int64_t>(swap->ids.size()));
  pool.supply->arena(mapping).Hold(swap->blocks);
  pool.supply->NoteSwap(mapping, swap->slot);
  pool.supply->FinishSwaps(mapping);
  ++pool.supply->swaps(mapping).counts().swapped_out;
  const auto count = static_cast<std::int64_t>(swap->blocks.size()) / pool.table->geometry().num_ranges();
  const bool write = swap->kept < count && !swap->wanted;
  swap->SetState(write ? SwapState::kWriting : SwapState::kMemory);
  if (write) pool.table->StartSwapWrite(pool.table->Lock());
  return write;
}

void EndWrite(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
              std::shared_ptr<store::SwapImage>* image) {
  if (swap->state() == SwapState::kWriting) {
    if (*image != nullptr) {
      pool.supply->swaps(mapping).counts().bytes_swapped_out += (*image)->bytes();
      ReleaseStored(pool, mapping, swap.get());
      swap->image = std::move(*image);
      swap->SetState(SwapState::kStored);
    } else {
      swap->SetState(SwapState::kMemory);  // the store's counters record the reason
    }
  }
  pool.table->EndSwapWrite(pool.table->Lock());
}

Claim StartRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::SwapRead* read) {
  if (Status status = Enter(pool, pool.table->Lock(), "prefetch"); !status.ok()) return FailedClaim(status);
  swap->wanted = true;
  if (swap->state() == SwapState::kWriting) {
    swap->StopCopies();
    swap->SetState(SwapState::kMemory);
  }
  if (swap->state() == SwapState::kGone) {
    return FailedClaim(FailedPrecondition("prefetch: the sequence was already swapped in or dropped"));
  }
  if (swap->state() != SwapState::kStored) return {};
  const std::int64_t ranges = pool.table->geometry().num_ranges();
  const auto missing = static_cast<std::int64_t>(swap->blocks.size()) - swap->kept * ranges;
  std::vector<std::int32_t> blocks;
  Claim claim = pool.supply->ClaimBlocks(mapping, missing, &blocks);
  if (!claim.status.ok()) return claim;
  std::copy(blocks.begin(), blocks.end(), swap->blocks.begin() + swap->kept * ranges);
  // Cannot fail: swap_out has already created the mover.
  static_cast<void>(DescribeRead(&pool.supply->arena(mapping), swap, read));
  swap->SetState(SwapState::kReading);
  return {};
}

void CancelRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap) {
  if (swap->state() != SwapState::kReading) return;
  ReleaseStored(pool, mapping, swap.get());
  swap->SetStored(swap->error());
}

void EndRead(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap, store::Problem problem,
             std::int64_t good) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  SwapTable& swaps = pool.supply->swaps(mapping);
  if (swap->image == nullptr) swaps.counts().bytes_swapped_in += good * geometry.block_bytes * ranges;
  if (swap->dropped) {
    Release(pool, mapping, std::move(swap->blocks));
    swap->blocks.clear();
    swaps.Remove(swap.get());
    return swap->SetState(SwapState::kGone);
  }
  if (problem == store::Problem::kNone) return swap->SetState(SwapState::kMemory);
  if (swap->image != nullptr) {
    ReleaseStored(pool, mapping, swap.get());
    return swap->SetStored(std::string("the store could not copy it into the pool's memory (") + Name(problem) +
                           "); it keeps the copy");
  }
  const std::int64_t there = swap->kept + good;
  const auto lost = swap->blocks.begin() + there * ranges;
  Release(pool, mapping, {lost, swap->blocks.end()});
  swap->blocks.erase(lost, swap->blocks.end());
  const auto tokens = static_cast<std::int64_t>(swap->ids.size());
  const std::int64_t recoverable = std::min(there * geometry.block_tokens, tokens);
  swap->SetDamaged(recoverable, std::string("what was written cannot be read (") + Name(problem) + "): the first " +
                                    Number(recoverable) + " of " + Number(tokens) + " tokens are recoverable");
}

void Drop(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap,
          std::shared_ptr<store::SwapImage>* image) {
  switch (swap->state()) {
    case SwapState::kGone:
      return;
    case SwapState::kReading:
      swap->dropped = true;  // the reader owns its blocks until it ends
      return;
    case SwapState::kQueued:
      pool.table->EndSwap(pool.table->Lock(), swap->slot);
      break;
    default:
      swap->StopCopies();
      break;
  }
  Release(pool, mapping, std::move(swap->blocks));
  swap->blocks.clear();
  *image = std::move(swap->image);
  pool.supply->swaps(mapping).Remove(swap.get());
  swap->SetState(SwapState::kGone);
}

}  // namespace kvpage::swapping::steps
