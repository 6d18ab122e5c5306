#include "cache/swapping.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache/swap_copies.h"

namespace kvpage::swapping {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

void Release(const PoolParts& pool, const MappingLock& mapping, std::vector<std::int32_t> blocks) {
  blocks.erase(std::remove(blocks.begin(), blocks.end(), -1), blocks.end());
  pool.supply->arena(mapping).Drop(blocks);
}

// A write has ended. Without an image the blocks stay in memory. An image that is no longer wanted is destroyed after
// the lock is released.
void EndWrite(const PoolParts& pool, const SwapPtr& swap, std::shared_ptr<store::SwapImage> image) {
  const std::int64_t ranges = pool.table->geometry().num_ranges();
  {
    const MappingLock mapping = pool.supply->Lock();
    if (swap->state() == SwapState::kWriting) {
      if (image != nullptr) {
        pool.supply->swaps(mapping).counts().bytes_swapped_out += image->bytes();
        const auto written = swap->blocks.begin() + swap->kept * ranges;
        Release(pool, mapping, {written, swap->blocks.end()});
        std::fill(written, swap->blocks.end(), -1);
        swap->image = std::move(image);
        swap->SetState(SwapState::kStored);
      } else {
        swap->SetState(SwapState::kMemory);  // the store's numbers say why
      }
    }
    pool.table->EndSwapWrite(pool.table->Lock());
  }
}

void EndRead(const PoolParts& pool, const SwapPtr& swap, store::Problem problem, std::int64_t good) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  // Nobody else looks at the image while it is being read.
  std::shared_ptr<store::SwapImage> kept;  // for another try
  if (problem != store::Problem::kNone && swap->image->outlives_failures()) kept = swap->image;
  swap->image = nullptr;
  const MappingLock mapping = pool.supply->Lock();
  SwapTable& swaps = pool.supply->swaps(mapping);
  if (kept == nullptr) swaps.counts().bytes_swapped_in += good * geometry.block_bytes * ranges;
  if (swap->dropped) {
    Release(pool, mapping, std::move(swap->blocks));
    swap->blocks.clear();
    swaps.Remove(swap.get());
    return swap->SetState(SwapState::kGone);
  }
  if (problem == store::Problem::kNone) return swap->SetState(SwapState::kMemory);
  if (kept != nullptr) {
    const auto read = swap->blocks.begin() + swap->kept * ranges;
    Release(pool, mapping, {read, swap->blocks.end()});
    std::fill(read, swap->blocks.end(), -1);
    swap->image = std::move(kept);
    return swap->SetStored(std::string("the store could not copy it into the pool's memory (") + Name(problem) +
                           "), and still has it");
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

// Takes the blocks of a slot whose release program has run. The slot empties when nobody uses it any more. Returns
// whether some are to be written.
bool Capture(const PoolParts& pool, const MappingLock& mapping, const SwapPtr& swap) {
  const Geometry& geometry = pool.table->geometry();
  Arena& arena = pool.supply->arena(mapping);
  const std::int64_t ranges = geometry.num_ranges();
  {
    const StateLock state = pool.table->Lock();
    const HostSlot& row = pool.table->host(state, swap->slot);
    swap->ids = row.committed;
    swap->space = row.space;
    swap->prompt = row.prompt;
    swap->SetTokens(static_cast<std::int64_t>(swap->ids.size()));
  }
  const std::int64_t count =
      std::min(geometry.BlocksFor(static_cast<std::int64_t>(swap->ids.size())), arena.blocks(swap->slot));
  const std::int32_t* const map = arena.map(swap->slot);
  swap->blocks.assign(map, map + count * ranges);
  swap->kept = count;
  while (swap->kept > 0 && arena.pool().references(map[(swap->kept - 1) * ranges]) == 1) --swap->kept;
  arena.Hold(swap->blocks);
  pool.supply->NoteSwap(mapping, swap->slot);
  pool.supply->FinishSwaps(mapping);
  ++pool.supply->swaps(mapping).counts().swapped_out;
  const bool write = swap->kept < count && !swap->wanted;
  swap->SetState(write ? SwapState::kWriting : SwapState::kMemory);
  if (write) pool.table->StartSwapWrite(pool.table->Lock());
  return write;
}

// For a thread that belongs to no pool: whether a sequence's slot has drained and what it has was taken, or nobody
// wants that any more. Asking costs next to nothing while programs that were queued before run.
bool PollOne(const PoolParts& pool, const SwapPtr& swap) {
  const std::shared_ptr<const void> owner = swap->pool.lock();
  if (owner == nullptr || swap->state() != SwapState::kQueued) return true;
  if (pool.mirror->Vacated(swap->slot) >= 0) Poll(pool);
  return swap->state() != SwapState::kQueued;
}

}  // namespace

Status Out(const PoolParts& pool, std::int32_t slot, const std::shared_ptr<store::SwapStore>& store,
           std::weak_ptr<const void> owner, SwapPtr* out) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(store->Check("swap_out"));
  const MappingLock mapping = pool.supply->Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, table.Lock(), "swap_out"));
  KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).OpenWindow());
  // Now, as nobody could report later that it cannot be made.
  std::shared_ptr<BlockMover> mover;
  KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).Mover(&mover));
  const StateLock state = table.Lock();
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, "swap_out", slot));
  const HostSlot& row = table.host(state, slot);
  if (row.dropped > 0) {
    return FailedPrecondition("swap_out: slot " + Number(slot) + " has dropped its tokens below " +
                              Number(row.dropped) + " (pool.drop_before): such a sequence cannot be swapped");
  }
  auto swap = std::make_shared<Swap>();
  swap->slot = slot;
  swap->SetTokens(static_cast<std::int64_t>(row.committed.size()));
  swap->store = store;
  swap->pool = std::move(owner);
  pool.supply->swaps(mapping).Add(swap);
  table.StartSwap(state, slot);
  if (pool.mirror != nullptr) {
    store->Watch([parts = &pool, swap] { return PollOne(*parts, swap); });
  }
  *out = std::move(swap);
  return {};
}

void UndoOut(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot) {
  SwapTable& swaps = pool.supply->swaps(mapping);
  const SwapPtr swap = swaps.Queued(slot);
  if (swap == nullptr) return;
  swaps.Remove(swap.get());
  swap->SetState(SwapState::kGone);
}

void Continue(const PoolParts& pool, const EditList& list) {
  const auto swaps = [&](const SlotEdit& edit) {
    if (edit.slot == -1 || edit.opcode != static_cast<std::int32_t>(SlotOpcode::kVacate)) return false;
    return pool.table->host(pool.table->Lock(), edit.slot).swapping;
  };
  if (std::any_of(list.edits, list.edits + list.num_edits, swaps)) Continue(pool);
}

void Continue(const PoolParts& pool) {
  std::vector<std::pair<std::shared_ptr<store::SwapStore>, store::SwapWrite>> writes;
  {
    const MappingLock mapping = pool.supply->Lock();
    const std::vector<SwapPtr> swaps = pool.supply->swaps(mapping).swaps();
    for (const SwapPtr& swap : swaps) {
      if (swap->state() != SwapState::kQueued) continue;
      const std::shared_ptr<const void> owner = swap->pool.lock();
      const bool vacated = pool.table->progress(pool.table->Lock()).slots[swap->slot].vacated;
      if (!vacated || owner == nullptr || !Capture(pool, mapping, swap)) continue;
      store::SwapWrite write;
      // It cannot fail: swap_out has made the mover.
      static_cast<void>(DescribeWrite(&pool.supply->arena(mapping), swap, &write));
      write.done = [owner, &pool, swap](const Status&, std::shared_ptr<store::SwapImage> image) {
        EndWrite(pool, swap, std::move(image));
      };
      writes.emplace_back(swap->store.lock(), std::move(write));
    }
  }
  // A store that is closed is done at once, and then takes the mapping mutex.
  for (auto& [store, write] : writes) {
    if (store != nullptr) {
      store->WriteSwapped(std::move(write));
    } else {
      write.done({}, nullptr);
    }
  }
}

void Poll(const PoolParts& pool) {
  if (pool.mirror == nullptr) return;
  CollectReleases(pool, pool.table->Lock());
  Continue(pool);
}

Claim Prefetch(const PoolParts& pool, const SwapPtr& swap) {
  Poll(pool);
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  store::SwapRead read;
  {
    const MappingLock mapping = pool.supply->Lock();
    if (Status status = Enter(pool, pool.table->Lock(), "prefetch"); !status.ok()) return FailedClaim(status);
    swap->wanted = true;
    if (swap->state() == SwapState::kWriting) {
      swap->StopCopies();
      swap->SetState(SwapState::kMemory);
    }
    if (swap->state() == SwapState::kGone) {
      return FailedClaim(FailedPrecondition("prefetch: the sequence was swapped in or given up"));
    }
    if (swap->state() != SwapState::kStored) return {};
    const std::shared_ptr<const void> owner = swap->pool.lock();
    const auto missing = static_cast<std::int64_t>(swap->blocks.size()) - swap->kept * ranges;
    std::vector<std::int32_t> blocks;
    Claim claim = pool.supply->ClaimBlocks(mapping, missing, &blocks);
    if (!claim.status.ok()) return claim;
    std::copy(blocks.begin(), blocks.end(), swap->blocks.begin() + swap->kept * ranges);
    // As in Continue, this cannot fail.
    static_cast<void>(DescribeRead(&pool.supply->arena(mapping), swap, &read));
    read.done = [owner, &pool, swap](store::Problem problem, std::int64_t good) { EndRead(pool, swap, problem, good); };
    swap->SetState(SwapState::kReading);
  }
  if (const std::shared_ptr<store::SwapStore> store = swap->store.lock(); store != nullptr) {
    store->ReadSwapped(std::move(read));
  } else {
    read.done(store::Problem::kClosed, 0);
  }
  return {};
}

void Drop(const PoolParts& pool, const SwapPtr& swap) {
  std::shared_ptr<store::SwapImage> image;  // ends after the lock: that may take a while
  const MappingLock mapping = pool.supply->Lock();
  switch (swap->state()) {
    case SwapState::kGone:
      return;
    case SwapState::kReading:
      swap->dropped = true;  // its blocks are the reader's until then
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
  image = std::move(swap->image);
  pool.supply->swaps(mapping).Remove(swap.get());
  swap->SetState(SwapState::kGone);
}

void DropAll(const PoolParts& pool) {
  const std::vector<SwapPtr> swaps = pool.supply->swaps(pool.supply->Lock()).swaps();
  for (const SwapPtr& swap : swaps) Drop(pool, swap);
}

}  // namespace kvpage::swapping
