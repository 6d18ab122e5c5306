// With a mirror, its slow calls are made while holding the mapping mutex but not the state mutex, so that the device
// never delays a handler. The only handler that takes the mapping mutex, map_slots, then holds nothing that the device
// or another handler needs.
#include "cache/generations.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "cache/swapping.h"

namespace kvpage::generations {
namespace {

// Publishes what truncations have exchanged but could not publish. No program that found the old blocks by number is
// still running.
Status PublishSeparated(const PoolParts& pool, const MappingLock& mapping) {
  std::vector<std::int32_t> slots;
  {
    const StateLock state = pool.table->Lock();
    const std::vector<SlotProgress>& rows = pool.table->progress(state).slots;
    for (std::int32_t slot = 0; slot < pool.table->num_slots(); ++slot) {
      if (rows[slot].by_block != 0) slots.push_back(slot);
    }
  }
  return slots.empty() ? Status() : PublishSlots(pool, mapping, slots, /*stopped=*/true);
}

Status StartOnDevice(const PoolParts& pool, Generation* out) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();  // so no map_slots is in progress
  std::int32_t generation = 0;
  {
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, "cache"));  // not Enter: a new generation clears a fault
    generation = ++table.progress(state).generation;
  }
  DeviceProgress device(table.geometry());
  KVPAGE_RETURN_IF_ERROR(pool.mirror->StartGeneration(generation, &device));
  CollectReleases(pool, table.Lock());  // including what their sequences had written
  KVPAGE_RETURN_IF_ERROR(PublishSeparated(pool, mapping));
  ++device.epoch;
  std::vector<SlotState> states;
  std::vector<std::int32_t> restored, shared;  // -1: the occupant was not swapped in
  {
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, "cache"));
    for (std::int64_t slot = 0; slot < table.num_slots(); ++slot) {
      const HostSlot& row = table.host(state, slot);
      states.push_back(row.state);
      restored.push_back(row.state == SlotState::kOccupied ? static_cast<std::int32_t>(row.restored) : -1);
      shared.push_back(table.progress(state).slots[slot].shared);
    }
  }
  std::vector<std::int32_t> written;  // per slot
  for (std::int64_t slot = 0; slot < table.num_slots(); ++slot) {
    written.push_back(std::min(device.slots[slot].length, device.WrittenInAllLayers(slot)));
    // A slot that is occupied on the host may be free on the device: its acquire was rejected there, or was queued too
    // late for the old generation, so it will never run.
    device.slots[slot].vacated |= states[slot] != SlotState::kOccupied;
    if (device.slots[slot].vacated && restored[slot] >= 0) {
      // The slot has had its sequence since the host swapped it in, whether or not the program has run.
      device.slots[slot].vacated = false;
      device.slots[slot].length = restored[slot];
      device.slots[slot].shared = shared[slot];
      device.RaiseWritten(slot, restored[slot]);
    }
    if (device.slots[slot].vacated) device.slots[slot].length = 0;
    device.StartGeneration(slot);
  }
  KVPAGE_RETURN_IF_ERROR(pool.mirror->SetGeneration(device));
  const StateLock state = table.Lock();
  table.progress(state).epoch = device.epoch;
  out->generation = generation;
  out->epoch = device.epoch;
  for (std::int32_t slot = 0; slot < table.num_slots(); ++slot) {
    // A slot whose release has just begun is still occupied in this generation. If a slot was already draining, its
    // release program belongs to the old generation and will be rejected.
    if (device.slots[slot].vacated && table.host(state, slot).state != SlotState::kFree) {
      table.StartDraining(state, slot);
      table.Vacate(state, slot, written[slot]);
    }
    if (table.host(state, slot).state == SlotState::kOccupied) {
      table.CutCommitted(state, slot, device.slots[slot].length);
    }
    out->lengths.push_back(device.slots[slot].vacated ? -1 : device.slots[slot].length);
  }
  return {};
}

// Programs on a device do not notify waiters, so their releases are polled until one has run.
bool PollForDrain(const PoolParts& pool, double seconds) {
  using Clock = std::chrono::steady_clock;
  SlotTable& table = *pool.table;
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::chrono::microseconds slice{20};
  std::int64_t before = -1;
  while (true) {
    {
      const StateLock state = table.Lock();
      const auto draining = [&] { return table.NumDraining(state) + table.swap_writes(state); };
      if (before < 0) before = draining();
      if (before == 0) return false;
      CollectReleases(pool, state);
      if (table.closed(state) || draining() < before) return true;
    }
    // No lock is held: any thread may be the first to notice a release that the device reports.
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(slice);
    slice = std::min(2 * slice, std::chrono::microseconds{1000});
  }
}

// Must be called while no handler runs.
void StartNow(SlotTable* table, const StateLock& state, Generation* out) {
  DeviceProgress& progress = table->progress(state);
  out->generation = ++progress.generation;
  out->epoch = progress.NextEpoch();
  progress.ForgetFault();
  for (std::int32_t slot = 0; slot < table->num_slots(); ++slot) {
    table->StartGeneration(state, slot);
    const bool occupied = table->host(state, slot).state == SlotState::kOccupied;
    progress.StartGeneration(slot);
    // If a program that was to write these tokens has failed, they are not final after all.
    if (occupied) table->CutCommitted(state, slot, progress.slots[slot].length);
    out->lengths.push_back(occupied ? progress.slots[slot].length : -1);
  }
}

Status StartOnHost(const PoolParts& pool, Generation* out, const GoOn& go_on) {
  SlotTable& table = *pool.table;
  Patience patience(go_on);
  bool waited = false;
  while (true) {
    {
      const Gate gate(&table);
      bool drained = false;
      {
        StateLock state = table.Lock();
        KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, "cache"));
        const DeviceProgress& progress = table.progress(state);
        if (progress.running > 0 && !std::exchange(waited, true)) table.CountWait(state);
        const auto done = [&] { return progress.running == 0 || table.closed(state); };
        drained = table.WaitFor(&state, patience.seconds(), done);
      }
      if (drained) {
        // Not between the steps of another call, which may have occupied slots that have no blocks yet.
        const MappingLock mapping = pool.supply->Lock();
        const StateLock state = table.Lock();
        KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, "cache"));
        if (table.progress(state).running == 0) {
          StartNow(&table, state, out);
          return {};
        }
      }
    }
    KVPAGE_RETURN_IF_ERROR(patience.Ask("cache"));
  }
}

}  // namespace

Status Start(const PoolParts& pool, Generation* out, const GoOn& go_on) {
  KVPAGE_RETURN_IF_ERROR(pool.mirror != nullptr ? StartOnDevice(pool, out) : StartOnHost(pool, out, go_on));
  // Truncations of older generations will never run.
  pool.supply->DropStaleSetAside(pool.supply->Lock());
  swapping::Continue(pool);
  return {};
}

bool WaitForDrain(const PoolParts& pool, double seconds) {
  if (pool.mirror != nullptr) return PollForDrain(pool, seconds);
  SlotTable& table = *pool.table;
  StateLock state = table.Lock();
  const auto draining = [&] { return table.NumDraining(state) + table.swap_writes(state); };
  const std::int64_t before = draining();
  if (before == 0) return false;
  return table.WaitFor(&state, seconds, [&] { return draining() < before || table.closed(state); });
}

Status Close(const PoolParts& pool, const GoOn& go_on) {
  SlotTable& table = *pool.table;
  Patience patience(go_on);
  bool waited = false;
  while (true) {
    {
      StateLock state = table.Lock();
      table.Close(state);  // no handler can start from now on, so the gate stays open
      const DeviceProgress& progress = table.progress(state);
      if (progress.running > 0 && !std::exchange(waited, true)) table.CountWait(state);
      if (table.WaitFor(&state, patience.seconds(), [&] { return progress.running == 0; })) break;
    }
    KVPAGE_RETURN_IF_ERROR(patience.Ask("close"));
  }
  if (pool.mirror == nullptr) {
    swapping::DropAll(pool);
    return {};
  }
  // Handlers of map_slots that are waiting for the mapping mutex will find the pool closed, so none of them waits for
  // the device while holding the mutex.
  {
    const MappingLock mapping = pool.supply->Lock();
    pool.mirror->Close();
  }
  swapping::DropAll(pool);
  return {};
}

}  // namespace kvpage::generations
