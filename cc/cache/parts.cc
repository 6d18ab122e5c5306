#include "cache/parts.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace kvpage {
namespace {

Status Publish(const PoolParts& pool, const MappingLock& mapping, const std::vector<Mirror::Room>& rooms,
               bool stopped) {
  if (!stopped) {
    // A truncation was not published: programs may since have found the old blocks by number.
    std::vector<Mirror::Room> unpublished;
    {
      const StateLock state = pool.table->Lock();
      for (const Mirror::Room& room : rooms) {
        if (pool.table->progress(state).slots[room.slot].by_block != 0) unpublished.push_back({room.slot, 0});
      }
    }
    if (!unpublished.empty()) KVPAGE_RETURN_IF_ERROR(pool.mirror->StopReaders(unpublished));
  }
  KVPAGE_RETURN_IF_ERROR(pool.mirror->SetRoom(rooms));
  {
    // Programs can no longer find blocks in these slots that a truncation has replaced (sharing.cc).
    const StateLock state = pool.table->Lock();
    for (const Mirror::Room& room : rooms) pool.table->progress(state).slots[room.slot].by_block = 0;
  }
  pool.supply->ReleaseHeld(mapping);
  return {};
}

}  // namespace

Status Enter(const PoolParts& pool, const StateLock& state, const char* op) {
  KVPAGE_RETURN_IF_ERROR(pool.table->CheckOpen(state, op));
  if (pool.mirror == nullptr) {
    const std::shared_ptr<SharedFaults>& faults = pool.table->progress(state).faults;
    return faults == nullptr ? Status() : faults->Get();
  }
  CollectReleases(pool, state);
  const Status fault = pool.mirror->TakeFault();
  return fault.ok() ? fault : fault.WithReason(Reason::kDeviceFault);
}

void CollectReleases(const PoolParts& pool, const StateLock& state) {
  if (pool.mirror == nullptr || pool.table->draining(state).empty()) return;
  // Slots park in the order of their releases, which is the order of the release programs, so joined pools park them in
  // the same order regardless of when each of them checks. Checking starts with the latest release: if it has run, so
  // have all earlier ones.
  std::vector<std::pair<std::uint64_t, std::int32_t>> draining;
  for (const std::int32_t slot : pool.table->draining(state)) {
    if (pool.table->progress(state).slots[slot].vacated) continue;
    draining.emplace_back(pool.table->host(state, slot).released_at, slot);
  }
  std::sort(draining.rbegin(), draining.rend());
  std::vector<std::pair<std::int32_t, std::int32_t>> vacated;  // slots and their numbers of written tokens
  for (const auto& [order, slot] : draining) {
    if (const std::int32_t written = pool.mirror->Vacated(slot); written >= 0) vacated.emplace_back(slot, written);
  }
  for (auto it = vacated.rbegin(); it != vacated.rend(); ++it) pool.table->Vacate(state, it->first, it->second);
}

Status PublishRoom(const PoolParts& pool, const MappingLock& mapping, const SupplyPlan& plan) {
  if (pool.mirror == nullptr) return {};
  const Geometry& geometry = pool.table->geometry();
  std::vector<Mirror::Room> rooms;
  for (const Grant& grant : plan.grants) {
    // In full blocks, like SlotTable::Room.
    const std::int64_t tokens = std::min(grant.wanted * geometry.block_tokens, geometry.max_seq_len);
    rooms.push_back({grant.slot, static_cast<std::int32_t>(tokens)});
  }
  Status status = Publish(pool, mapping, rooms, /*stopped=*/false);
  if (!status.ok()) pool.supply->Undo(mapping, plan);
  return status;
}

Status PublishSlots(const PoolParts& pool, const MappingLock& mapping, const std::vector<std::int32_t>& slots,
                    bool stopped) {
  if (pool.mirror == nullptr) return {};
  std::vector<Mirror::Room> rooms;
  {
    const StateLock state = pool.table->Lock();
    for (const std::int32_t slot : slots) {
      rooms.push_back({slot, static_cast<std::int32_t>(pool.table->Room(state, slot))});
    }
  }
  return Publish(pool, mapping, rooms, stopped);
}

Status OpenTable(const PoolParts& pool) {
  if (pool.mirror == nullptr) return {};
  const MappingLock mapping = pool.supply->Lock();
  if (pool.table->closed(pool.table->Lock())) return {};
  Arena& arena = pool.supply->arena(mapping);
  if (arena.window() == nullptr) KVPAGE_RETURN_IF_ERROR(arena.OpenWindow());
  return pool.mirror->OpenTable(arena.window(), &arena.block_table());
}

}  // namespace kvpage
