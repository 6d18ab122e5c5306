// The pool where programs run on a device of their own: it publishes through its mirror and takes in from it.
//
// The mirror's slow calls are made with the mapping mutex held and without the state mutex, so that a handler is never
// delayed by the device. The one handler that takes the mapping mutex, map_slots, holds nothing then that the device or
// another handler would need.
#include <algorithm>
#include <chrono>
#include <thread>

#include "cache/messages.h"
#include "cache/pool.h"

namespace kvpage {

Status Pool::OpenMirror() {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  return mirror_->Open(id_);
}

void Pool::TakeInReleases() {
  if (mirror_ == nullptr) return;
  for (std::int32_t slot = 0; slot < geometry_.max_slots; ++slot) {
    Slot& row = slots_[slot];
    if (row.state != SlotState::kDraining || row.vacated || !mirror_->Vacated(slot)) continue;
    row.vacated = true;
    FinishDraining(slot);
  }
}

Status Pool::Enter(const char* op) {
  KVPAGE_RETURN_IF_ERROR(CheckOpen(op));
  if (mirror_ == nullptr) return {};
  TakeInReleases();
  const Status fault = mirror_->TakeFault();
  return fault.ok() ? fault : fault.WithReason(Reason::kDeviceFault);
}

Status Pool::TakeFault() {
  const std::lock_guard<std::mutex> state(state_mutex_);
  return Enter("check");
}

Status Pool::PublishRoom(const std::vector<Want>& wants, const std::vector<std::int64_t>& before) {
  if (mirror_ == nullptr) return {};
  std::vector<Mirror::Room> rooms;
  for (const Want& want : wants) {
    // Whole blocks, as Room() has it.
    const std::int64_t tokens = std::min(want.blocks * geometry_.block_tokens, geometry_.max_seq_len);
    rooms.push_back({want.slot, static_cast<std::int32_t>(tokens)});
  }
  Status status = mirror_->SetRoom(rooms);
  if (status.ok()) return {};
  for (std::size_t i = 0; i < wants.size(); ++i) static_cast<void>(arena_->Shrink(wants[i].slot, before[i]));
  return status;
}

Status Pool::MapChecked(const char* op, std::int32_t generation, const std::int32_t* slots, const std::int32_t* tokens,
                        std::int64_t count, bool* ok) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  PinnedSlots pinned;  // pins the slots: their owner stays while blocks are mapped without the state mutex
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(CheckOpen(op));
    ++waits_;  // the handler has waited for the device's word
    // The host may have begun a new generation since the device looked: the slots may be somebody else's by now.
    if (generation != generation_) return messages::OtherGeneration(op, id_, generation, generation_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (slots[i] == -1) continue;
      if (slots[i] < 0 || slots[i] >= geometry_.max_slots)
        return messages::SlotRange(op, slots[i], geometry_.max_slots);
      if (slots_[slots[i]].state == SlotState::kFree) return messages::SlotFree(op, slots[i]);
      pinned.sequences_.push_back({slots[i], 0, 0, 0});
    }
    for (const Sequence& sequence : pinned.sequences_) ++slots_[sequence.slot].pins;
    ++running_;
    pinned.pool_ = this;
  }
  return MapPinned(op, slots, tokens, count, ok);
}

Status Pool::NewGenerationOnDevice(Generation* out) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);  // so no map_slots is at work
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(CheckOpen("cache"));  // not Enter: a new generation is the way out of a fault
    // Never the same number twice: when what follows fails, nobody knows which one the device has.
    ++generation_;
  }
  Mirror::GenerationState generation;
  KVPAGE_RETURN_IF_ERROR(mirror_->StartGeneration(generation_, &generation));
  ++generation.epoch;
  std::vector<SlotState> states;
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(CheckOpen("cache"));
    for (const Slot& row : slots_) states.push_back(row.state);
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Mirror::SlotProgress& slot = generation.slots[i];
    slot.since = generation.epoch;
    if (states[i] != SlotState::kOccupied) slot.length = 0;
    // Rows beyond the restored length may be half written; nobody may count on them.
    for (std::int32_t& written : slot.written) written = std::min(written, slot.length);
  }
  KVPAGE_RETURN_IF_ERROR(mirror_->SetGeneration(generation));
  const std::lock_guard<std::mutex> state(state_mutex_);
  epoch_ = generation.epoch;
  out->generation = generation_;
  out->epoch = epoch_;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& row = slots_[i];
    // A slot whose release began only now is still occupied in this generation.
    if (states[i] == SlotState::kDraining && row.state == SlotState::kDraining) {
      row.vacated = true;  // its program belongs to the old generation and will be refused
      FinishDraining(static_cast<std::int64_t>(i));
    }
    out->lengths.push_back(states[i] == SlotState::kOccupied ? generation.slots[i].length : -1);
  }
  return {};
}

bool Pool::PollForDrain(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::chrono::microseconds slice{20};
  std::int64_t before = -1;
  while (true) {
    {
      const std::lock_guard<std::mutex> state(state_mutex_);
      if (before < 0) before = NumDraining();
      if (before == 0) return false;
      TakeInReleases();
      if (closed_ || NumDraining() < before) return true;
    }
    // No lock held: a release that the device reports is seen by whoever calls next, this or another thread.
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(slice);
    slice = std::min(2 * slice, std::chrono::microseconds{1000});
  }
}

}  // namespace kvpage
