#include "cache/swapping.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cache/prefix_store.h"

namespace kvpage::swapping {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Begins calls for pools on CPU.
Status EnterOnHost(const PoolParts& pool, const char* op) {
  KVPAGE_RETURN_IF_ERROR(Enter(pool, pool.table->Lock(), op));
  if (pool.mirror == nullptr) return {};
  return {Code::kUnimplemented, std::string(op) + ": pools on CPU only"};
}

void Release(const PoolParts& pool, const MappingLock& mapping, std::vector<std::int32_t> blocks) {
  blocks.erase(std::remove(blocks.begin(), blocks.end(), -1), blocks.end());
  pool.supply->arena(mapping).Drop(blocks);
}

// Blocks of a swap as bytes, for the store: zeros behind the last token.
class BlockCopier {
 public:
  BlockCopier(const Geometry& geometry, const char* window, const SwapPtr& swap)
      : geometry_(geometry),
        window_(window),
        swap_(swap),
        blocks_(swap->blocks),
        begin_(swap->kept),
        tokens_(static_cast<std::int64_t>(swap->ids.size())) {}

  bool operator()(std::int64_t begin, std::int64_t count, char* to) const {
    const std::int64_t ranges = geometry_.num_ranges(), bytes = geometry_.block_bytes;
    const std::lock_guard<std::mutex> lock(swap_->copy_mutex);
    if (swap_->copies_stopped) return false;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t logical = begin_ + begin + i;
      char* const block = to + i * ranges * bytes;
      for (std::int64_t range = 0; range < ranges; ++range) {
        std::memcpy(block + range * bytes, window_ + blocks_[logical * ranges + range] * bytes, bytes);
      }
      geometry_.ZeroTokens(block, std::max<std::int64_t>(tokens_ - logical * geometry_.block_tokens, 0));
    }
    return true;
  }

 private:
  const Geometry geometry_;
  const char* const window_;
  const SwapPtr swap_;
  const std::vector<std::int32_t> blocks_;
  const std::int64_t begin_, tokens_;
};

// A write has ended. Without a file the blocks stay in memory. A file that nobody wants ends after the lock.
void EndWrite(const PoolParts& pool, const SwapPtr& swap, std::shared_ptr<store::SwapFile> file) {
  const std::int64_t ranges = pool.table->geometry().num_ranges();
  {
    const MappingLock mapping = pool.supply->Lock();
    if (swap->state() == SwapState::kWriting) {
      if (file != nullptr) {
        pool.supply->swaps(mapping).counts().bytes_swapped_out += file->bytes();
        const auto written = swap->blocks.begin() + swap->kept * ranges;
        Release(pool, mapping, {written, swap->blocks.end()});
        std::fill(written, swap->blocks.end(), -1);
        swap->file = std::move(file);
        swap->SetState(SwapState::kDisk);
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
  swap->file = nullptr;  // read or not; while it is being read nobody else looks at it
  const MappingLock mapping = pool.supply->Lock();
  SwapTable& swaps = pool.supply->swaps(mapping);
  swaps.counts().bytes_swapped_in += good * geometry.block_bytes * ranges;
  if (swap->dropped) {
    Release(pool, mapping, std::move(swap->blocks));
    swap->blocks.clear();
    swaps.Remove(swap.get());
    return swap->SetState(SwapState::kGone);
  }
  if (problem == store::Problem::kNone) return swap->SetState(SwapState::kMemory);
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

}  // namespace

Status Out(const PoolParts& pool, std::int32_t slot, const std::shared_ptr<store::BlockStore>& store,
           std::weak_ptr<const void> owner, SwapPtr* out) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(store->Check("swap_out"));
  const MappingLock mapping = pool.supply->Lock();
  KVPAGE_RETURN_IF_ERROR(EnterOnHost(pool, "swap_out"));
  KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).OpenWindow());
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
  std::vector<std::pair<std::shared_ptr<store::BlockStore>, store::SwapWrite>> writes;
  {
    const MappingLock mapping = pool.supply->Lock();
    const std::vector<SwapPtr> swaps = pool.supply->swaps(mapping).swaps();
    for (const SwapPtr& swap : swaps) {
      if (swap->state() != SwapState::kQueued) continue;
      const std::shared_ptr<const void> owner = swap->pool.lock();
      const bool vacated = pool.table->progress(pool.table->Lock()).slots[swap->slot].vacated;
      if (!vacated || owner == nullptr || !Capture(pool, mapping, swap)) continue;
      store::SwapWrite write;
      write.shape = prefix::StoredShape(pool.table->geometry());
      write.blocks = static_cast<std::int64_t>(swap->blocks.size()) / write.shape.ranges - swap->kept;
      write.copy = BlockCopier(pool.table->geometry(), pool.supply->arena(mapping).window(), swap);
      write.done = [owner, &pool, swap](const Status&, std::shared_ptr<store::SwapFile> file) {
        EndWrite(pool, swap, std::move(file));
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

Claim Prefetch(const PoolParts& pool, const SwapPtr& swap) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  store::SwapRead read;
  {
    const MappingLock mapping = pool.supply->Lock();
    if (Status status = EnterOnHost(pool, "prefetch"); !status.ok()) return FailedClaim(status);
    swap->wanted = true;
    if (swap->state() == SwapState::kWriting) {
      swap->StopCopies();
      swap->SetState(SwapState::kMemory);
    }
    if (swap->state() == SwapState::kGone) {
      return FailedClaim(FailedPrecondition("prefetch: the sequence was swapped in or given up"));
    }
    if (swap->state() != SwapState::kDisk) return {};
    const std::shared_ptr<const void> owner = swap->pool.lock();
    const auto missing = static_cast<std::int64_t>(swap->blocks.size()) - swap->kept * ranges;
    std::vector<std::int32_t> blocks;
    Claim claim = pool.supply->ClaimBlocks(mapping, missing, &blocks);
    if (!claim.status.ok()) return claim;
    std::copy(blocks.begin(), blocks.end(), swap->blocks.begin() + swap->kept * ranges);
    char* const window = pool.supply->arena(mapping).window();
    for (const std::int32_t block : blocks) read.destinations.push_back(window + block * geometry.block_bytes);
    read.file = swap->file;
    read.done = [owner, &pool, swap](store::Problem problem, std::int64_t good) { EndRead(pool, swap, problem, good); };
    swap->SetState(SwapState::kReading);
  }
  if (const std::shared_ptr<store::BlockStore> store = swap->store.lock(); store != nullptr) {
    store->ReadSwapped(std::move(read));
  } else {
    read.done(store::Problem::kClosed, 0);
  }
  return {};
}

void Drop(const PoolParts& pool, const SwapPtr& swap) {
  std::shared_ptr<store::SwapFile> file;  // ends after the lock: that may take a while
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
  file = std::move(swap->file);
  pool.supply->swaps(mapping).Remove(swap.get());
  swap->SetState(SwapState::kGone);
}

void DropAll(const PoolParts& pool) {
  const std::vector<SwapPtr> swaps = pool.supply->swaps(pool.supply->Lock()).swaps();
  for (const SwapPtr& swap : swaps) Drop(pool, swap);
}

}  // namespace kvpage::swapping
