#include "cache/swapping.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache/swap_copies.h"
#include "cache/swap_steps.h"

namespace kvpage::swapping {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Ends a write. An unwanted image is destroyed after the lock is released.
void EndWrite(const PoolParts& pool, const SwapPtr& swap, std::shared_ptr<store::SwapImage> image) {
  const MappingLock mapping = pool.supply->Lock();
  steps::EndWrite(pool, mapping, swap, &image);
}

void EndRead(const PoolParts& pool, const SwapPtr& swap, store::Problem problem, std::int64_t good) {
  // Nothing else accesses the image during a read. It is kept only for a retry.
  if (problem == store::Problem::kNone || !swap->image->outlives_failures()) swap->image = nullptr;
  steps::EndRead(pool, pool.supply->Lock(), swap, problem, good);
}

// For a thread that belongs to no pool: returns true once a sequence's slot has drained and its contents were taken, or
// if nobody wants that any more. Very cheap while programs that were queued earlier are still running.
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
  // Created now, because a failure could not be reported later.
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
  std::vector<std::shared_ptr<SwapGroup>> groups;
  {
    const MappingLock mapping = pool.supply->Lock();
    const std::vector<SwapPtr> swaps = pool.supply->swaps(mapping).swaps();
    for (const SwapPtr& swap : swaps) {
      if (swap->state() != SwapState::kQueued) continue;
      const std::shared_ptr<const void> owner = swap->pool.lock();
      if (!steps::Vacated(pool, *swap) || owner == nullptr) continue;
      if (swap->in_group) {
        groups.push_back(swap->group.lock());
        continue;
      }
      steps::Find(pool, mapping, swap.get());
      if (!steps::Take(pool, mapping, swap)) continue;
      store::SwapWrite write;
      // Cannot fail: swap_out has already created the mover.
      static_cast<void>(DescribeWrite(&pool.supply->arena(mapping), swap, &write));
      write.done = [owner, &pool, swap](const Status&, std::shared_ptr<store::SwapImage> image) {
        EndWrite(pool, swap, std::move(image));
      };
      writes.emplace_back(swap->store.lock(), std::move(write));
    }
  }
  for (const std::shared_ptr<SwapGroup>& group : groups) {
    if (group != nullptr) group->Continue();
  }
  // A closed store calls `done` at once, which takes the mapping mutex.
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
  store::SwapRead read;
  {
    const MappingLock mapping = pool.supply->Lock();
    Claim claim = steps::StartRead(pool, mapping, swap, &read);
    if (!claim.status.ok() || read.image == nullptr) return claim;
  }
  read.done = [owner = swap->pool.lock(), &pool, swap](store::Problem problem, std::int64_t good) {
    EndRead(pool, swap, problem, good);
  };
  if (const std::shared_ptr<store::SwapStore> store = swap->store.lock(); store != nullptr) {
    store->ReadSwapped(std::move(read));
  } else {
    read.done(store::Problem::kClosed, 0);
  }
  return {};
}

void Drop(const PoolParts& pool, const SwapPtr& swap) {
  std::shared_ptr<store::SwapImage> image;  // destroyed after the lock, as that may take a while
  const MappingLock mapping = pool.supply->Lock();
  steps::Drop(pool, mapping, swap, &image);
}

void DropAll(const PoolParts& pool) {
  const std::vector<SwapPtr> swaps = pool.supply->swaps(pool.supply->Lock()).swaps();
  for (const SwapPtr& swap : swaps) Drop(pool, swap);
}

}  // namespace kvpage::swapping
