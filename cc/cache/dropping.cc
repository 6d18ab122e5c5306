#include "cache/dropping.h"

#include <algorithm>
#include <string>

#include "cache/messages.h"

namespace kvpage::dropping {
namespace {

constexpr const char* kVerb = "drop_before";

// Computes the number of tokens, in full blocks, that the slot is to drop; 0 if there are no more than it has already
// dropped.
Status Check(const SlotTable& table, const StateLock& state, std::int32_t slot, std::int64_t tokens,
             std::int64_t* dropped) {
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, kVerb, slot));
  const std::int64_t room = table.Room(state, slot);
  if (tokens > room) return messages::DropBeyond(kVerb, slot, tokens, room);
  *dropped = tokens - tokens % table.geometry().block_tokens;
  if (*dropped <= table.host(state, slot).dropped) *dropped = 0;
  return {};
}

Status CheckAll(const PoolParts& pool, const StateLock& state, const std::vector<std::int32_t>& slots,
                const std::vector<std::int64_t>& tokens, std::vector<std::int64_t>* dropped) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, kVerb));
  table.StartNaming(state);
  dropped->assign(slots.size(), 0);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    KVPAGE_RETURN_IF_ERROR(Check(table, state, slots[i], tokens[i], &(*dropped)[i]));
    if (!table.Name(state, slots[i])) return messages::SlotTwice(kVerb, slots[i]);
  }
  return {};
}

}  // namespace

Status Drops(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out) {
  const StateLock state = pool.table->Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, kVerb));
  std::int64_t dropped = 0;
  KVPAGE_RETURN_IF_ERROR(Check(*pool.table, state, slot, tokens, &dropped));
  *out = dropped > 0;
  return {};
}

Status Start(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens,
             const CacheRef& cache, std::vector<std::int64_t>* dropped) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  KVPAGE_RETURN_IF_ERROR(CheckAll(pool, table.Lock(), slots, tokens, dropped));
  std::vector<Mirror::Room> begins;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if ((*dropped)[i] > 0) begins.push_back({slots[i], static_cast<std::int32_t>((*dropped)[i])});
  }
  if (begins.empty()) return {};
  if (pool.mirror != nullptr) {
    table.CountWait(table.Lock());  // the caller has waited for the programs of the slots
    KVPAGE_RETURN_IF_ERROR(pool.mirror->Drop(begins, cache));
  }
  // From now on nobody may find the sequence: the next lookup skips slots that have dropped tokens.
  pool.supply->SyncIndex(mapping);
  for (const Mirror::Room& begin : begins) {
    pool.supply->CutIndex(mapping, begin.slot, 0);
    const StateLock state = table.Lock();
    table.StartDrop(state, begin.slot, begin.tokens);
    if (pool.mirror == nullptr) continue;
    table.NoteDropped(state, begin.slot, begin.tokens);
    pool.supply->NoteDrop(mapping, begin.slot);
  }
  pool.supply->FinishDrops(mapping);
  return {};
}

void Unmap(const PoolParts& pool, const EditList& list) {
  const auto drops = [](const SlotEdit& edit) {
    return edit.slot != -1 && edit.opcode == static_cast<std::int32_t>(SlotOpcode::kDrop);
  };
  if (std::none_of(list.edits, list.edits + list.num_edits, drops)) return;
  const MappingLock mapping = pool.supply->Lock();
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    if (!drops(list.edits[i])) continue;
    pool.supply->CutIndex(mapping, list.edits[i].slot, 0);  // if the drop was undone, it has been stored again
    pool.supply->NoteDrop(mapping, list.edits[i].slot);
  }
  pool.supply->FinishDrops(mapping);
}

}  // namespace kvpage::dropping
