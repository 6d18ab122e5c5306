#include "cache/views.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cache/messages.h"
#include "cache/program_check.h"

namespace kvpage::views {
namespace {

// The slot whose memory begins at the array; -1 for all slots; otherwise kNoView.
constexpr std::int64_t kNoView = -2;

std::int64_t FindSlot(const Geometry& geometry, const KVView& memory, const ViewRef& array) {
  const std::int64_t slot_bytes = geometry.max_seq_len * geometry.data_bytes();
  const bool all = array.bytes == geometry.max_slots * slot_bytes;
  if (!all && array.bytes != slot_bytes) return kNoView;
  for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) {
    for (const int kv : {0, 1}) {
      const char* const begin = memory.Chunk(0, 0, layer, kv);
      const std::int64_t offset = static_cast<const char*>(array.data) - begin;
      if (all && offset == 0) return -1;
      if (all || offset < 0 || offset >= geometry.max_slots * memory.slot_stride) continue;
      if (offset % memory.slot_stride == 0) return offset / memory.slot_stride;
    }
  }
  return kNoView;
}

Status CheckArguments(const PoolParts& pool, const StateLock& state, std::int64_t layer, std::int32_t slot) {
  SlotTable& table = *pool.table;
  const std::int64_t num_layers = table.geometry().num_layers;
  KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, "view"));
  if (pool.mirror != nullptr) {
    return InvalidArgument(
        "view: pool " + std::to_string(table.id()) +
        " lies in device memory, where the part of a slot that is not mapped cannot be read, so an array cannot show "
        "it: read the cache with paged_attention, or use a pool on a CPU device for views");
  }
  if (layer < 0 || layer >= num_layers) {
    return OutOfRange("view: layer is " + std::to_string(layer) + ", wanted 0.." + std::to_string(num_layers - 1));
  }
  if (slot >= 0) return table.CheckOccupied(state, "view", slot);
  if (slot == -1) return {};
  return InvalidArgument("view: slot " + std::to_string(slot) + " does not exist");
}

}  // namespace

Status Add(const PoolParts& pool, std::int64_t layer, std::int32_t slot, const GoOn& go_on) {
  SlotTable& table = *pool.table;
  const std::int64_t begin = slot >= 0 ? slot : 0;
  const std::int64_t end = slot >= 0 ? slot + 1 : table.num_slots();
  // Recycled memory beyond the tokens that its occupant has written is zeroed once; memory that is mapped while the
  // view exists is zeroed when it is mapped (Supply::Blank). No handler may be writing meanwhile.
  const auto busy = [&](const StateLock& state) {
    const std::vector<SlotProgress>& slots = table.progress(state).slots;
    return std::any_of(slots.begin() + begin, slots.begin() + end, [](const SlotProgress& s) { return s.pins > 0; });
  };
  Patience patience(go_on);
  bool waited = false;
  while (true) {
    {
      const Gate gate(&table);
      {
        // Wait without the mapping mutex, which every inspection of the pool needs.
        StateLock state = table.Lock();
        KVPAGE_RETURN_IF_ERROR(CheckArguments(pool, state, layer, slot));
        if (busy(state) && !std::exchange(waited, true)) table.CountWait(state);
        const auto done = [&] { return !busy(state) || table.closed(state); };
        static_cast<void>(table.WaitFor(&state, patience.seconds(), done));
      }
      const MappingLock mapping = pool.supply->Lock();
      if (slot == -1) KVPAGE_RETURN_IF_ERROR(pool.supply->DropFreeCached(mapping));
      const StateLock state = table.Lock();
      KVPAGE_RETURN_IF_ERROR(CheckArguments(pool, state, layer, slot));  // again: it may have been released
      if (!busy(state)) {
        for (std::int64_t s = begin; s < end; ++s) {
          const bool owned = table.host(state, s).state != SlotState::kFree;
          const std::int64_t written = owned ? table.progress(state).Written(s)[layer] : 0;
          const Arena& arena = pool.supply->arena(mapping);
          // Excludes what other slots read.
          const std::int64_t others = std::max(arena.SharedBlocks(s), arena.ReadOnlyBlocks(s));
          const std::int64_t from = std::max(written, others * table.geometry().block_tokens);
          pool.supply->arena(mapping).ZeroTail(s, layer, from);
        }
        table.AddView(state, slot);
        return {};
      }
    }
    KVPAGE_RETURN_IF_ERROR(patience.Ask("view"));
  }
}

void Remove(const PoolParts& pool, std::int32_t slot) { pool.table->RemoveView(pool.table->Lock(), slot); }

Status Check(const PoolParts& pool, const char* op, const CacheRef& cache, const std::vector<ViewRef>& arrays) {
  SlotTable& table = *pool.table;
  const StateLock state = table.Lock();
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/false));
  const KVView memory = table.geometry().View(pool.supply->base());
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const std::int64_t slot = FindSlot(table.geometry(), memory, arrays[i]);
    if (slot == kNoView) return messages::NotAView(op, static_cast<std::int64_t>(i), table.id());
    if (slot < 0) continue;
    if (cache.lengths[slot] < 0) return messages::SlotFree(op, static_cast<std::int32_t>(slot));
    KVPAGE_RETURN_IF_ERROR(check.Fresh(static_cast<std::int32_t>(slot)));
  }
  return {};
}

}  // namespace kvpage::views
