#include "cache/map_ops.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cache/messages.h"
#include "cache/program_check.h"

namespace kvpage::map_ops {
namespace {

// Maps what pinned slots request: their owners stay while blocks are mapped without the state mutex.
Status MapPinned(const PoolParts& pool, const MappingLock& mapping, const char* op, const std::int32_t* slots,
                 const std::int32_t* tokens, std::int64_t count, bool* ok) {
  SlotTable& table = *pool.table;
  std::vector<Want> wants(1);
  SupplyPlan plan;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t slot = slots[i];
    ok[i] = slot == -1 || !Beyond(table, tokens[i]);
    if (slot == -1 || !ok[i]) continue;
    {
      const StateLock state = table.Lock();
      const std::int64_t total = std::max<std::int64_t>(tokens[i], table.host(state, slot).reserved);
      wants[0] = {slot, table.geometry().BlocksFor(total)};
    }
    Claim claim = pool.supply->Reserve(mapping, wants, &plan);
    if (claim.status.ok()) {
      claim.status = PublishRoom(pool, mapping, plan);
    } else if (claim.status.code() == Code::kResourceExhausted) {
      ok[i] = false;
      continue;
    }
    if (!claim.status.ok()) {
      return claim.status.WithMessage(std::string(op) + ": slot " + std::to_string(slot) + ": " +
                                      claim.status.message());
    }
    table.Reserve(table.Lock(), slot, tokens[i]);
  }
  return {};
}

}  // namespace

bool Beyond(const SlotTable& table, std::int32_t tokens) { return tokens > table.geometry().max_seq_len; }

Status Check(const PoolParts& pool, const StateLock& state, const char* op, const CacheRef& cache,
             const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok, bool* enough) {
  SlotTable& table = *pool.table;
  const ProgramCheck program(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(program.Begin(/*mutates=*/true));
  *enough = true;
  for (std::int64_t i = 0; i < count; ++i) {
    ok[i] = slots[i] == -1 || !Beyond(table, tokens[i]);
    if (slots[i] == -1) continue;
    KVPAGE_RETURN_IF_ERROR(program.OccupiedSlot(slots[i]));
    if (table.Vacant(state, slots[i])) return messages::SlotFree(op, slots[i]);
    if (tokens[i] < 0) return messages::MaxSeqLen(op, slots[i], tokens[i], table.geometry().max_seq_len);
    *enough &= !ok[i] || tokens[i] <= table.host(state, slots[i]).reserved;
  }
  return {};
}

Status MapSlots(const PoolParts& pool, const char* op, const CacheRef& cache, const std::int32_t* slots,
                const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch) {
  SlotTable& table = *pool.table;
  bool enough = true;
  {
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(Check(pool, state, op, cache, slots, tokens, count, ok, &enough));
    if (enough) {
      *epoch = table.progress(state).NextEpoch();
      return {};
    }
  }
  while (true) {
    {
      StateLock state = table.Lock();
      table.PassGate(&state);  // not later: views::Add keeps the gate closed until it has the mapping mutex
    }
    const MappingLock mapping = pool.supply->Lock();
    PinnedSlots pinned;
    {
      const StateLock state = table.Lock();
      if (table.gated(state)) continue;
      KVPAGE_RETURN_IF_ERROR(Check(pool, state, op, cache, slots, tokens, count, ok, &enough));
      *epoch = table.progress(state).NextEpoch();
      Pins pins;
      for (std::int64_t i = 0; i < count; ++i) {
        if (slots[i] != -1) pins.sequences.push_back({slots[i], 0, 0, 0});
      }
      pinned.Pin(state, &table, std::move(pins));
    }
    return MapPinned(pool, mapping, op, slots, tokens, count, ok);
  }
}

Status CheckOnHost(const PoolParts& pool, const StateLock& state, const char* op, std::int32_t generation,
                   const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, op));
  CollectReleases(pool, state);
  // The host may have begun a new generation since the device's check, so the slots may have new owners.
  const std::int32_t current = table.progress(state).generation;
  if (generation != current) return messages::OtherGeneration(op, table.id(), generation, current);
  for (std::int64_t i = 0; i < count; ++i) {
    ok[i] = slots[i] == -1 || !Beyond(table, tokens[i]);
    if (slots[i] == -1) continue;
    if (slots[i] < 0 || slots[i] >= table.num_slots()) return messages::SlotRange(op, slots[i], table.num_slots());
    if (table.host(state, slots[i]).state == SlotState::kFree) return messages::SlotFree(op, slots[i]);
  }
  return {};
}

Status MapChecked(const PoolParts& pool, const char* op, std::int32_t generation, const std::int32_t* slots,
                  const std::int32_t* tokens, std::int64_t count, bool* ok) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  PinnedSlots pinned;
  {
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(CheckOnHost(pool, state, op, generation, slots, tokens, count, ok));
    table.CountWait(state);  // the handler has waited for the device's answer
    Pins pins;
    for (std::int64_t i = 0; i < count; ++i) {
      if (slots[i] != -1) pins.sequences.push_back({slots[i], 0, 0, 0});
    }
    pinned.Pin(state, &table, std::move(pins));
  }
  return MapPinned(pool, mapping, op, slots, tokens, count, ok);
}

}  // namespace kvpage::map_ops
