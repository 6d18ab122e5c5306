#include "cache/slot_table.h"

#include <algorithm>

namespace kvpage {

SlotTable::SlotTable(const Geometry& geometry)
    : geometry_(geometry),
      slots_(geometry.max_slots),
      changes_(geometry.max_slots),
      progress_(geometry),
      named_(geometry.max_slots, 0) {}

Status SlotTable::CheckOccupied(const StateLock&, const char* op, std::int32_t slot) const {
  if (slot < 0 || slot >= geometry_.max_slots) {
    return InvalidArgument(std::string(op) + ": slot " + std::to_string(slot) + " does not exist, slots are 0.." +
                           std::to_string(geometry_.max_slots - 1));
  }
  if (slots_[slot].state == SlotState::kOccupied) return {};
  return FailedPrecondition(
      std::string(op) + ": slot " + std::to_string(slot) + " is " +
      (slots_[slot].state == SlotState::kFree ? "free: acquire it first" : "draining: it was released"));
}

void SlotTable::SetState(std::int32_t slot, SlotState state) {
  slots_[slot].state = state;
  if (state == SlotState::kDraining) {
    draining_.insert(slot);
  } else {
    draining_.erase(slot);
  }
  changes_.Note(slot);
}

void SlotTable::Occupy(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  HostSlot& row = slots_[slot];
  SetState(slot, SlotState::kOccupied);
  row.reserved = tokens;
  row.committed.clear();
  progress_.Reset(slot);
}

void SlotTable::Reserve(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  if (tokens <= slots_[slot].reserved) return;
  slots_[slot].reserved = tokens;
  changes_.Note(slot);
}

void SlotTable::Vacate(const StateLock&, std::int32_t slot) {
  progress_.slots[slot].vacated = true;
  progress_.LowerWritten(slot, 0);
  FinishDraining(slot);
}

// The slot is free once nothing can touch it any more.
void SlotTable::FinishDraining(std::int32_t slot) {
  HostSlot& row = slots_[slot];
  SlotProgress& progress = progress_.slots[slot];
  if (row.state != SlotState::kDraining || !progress.vacated || progress.pins > 0 || row.views > 0) return;
  SetState(slot, SlotState::kFree);
  row.reserved = 0;
  row.committed.clear();
  row.parked_at = ++parkings_;
  progress.vacated = false;
  progress.length = 0;
  changed_.notify_all();
}

void SlotTable::AddView(const StateLock&, std::int32_t slot) {
  ++(slot >= 0 ? slots_[slot].views : views_of_all_);
  if (slot >= 0) changes_.Note(slot);
}

void SlotTable::RemoveView(const StateLock&, std::int32_t slot) {
  --(slot >= 0 ? slots_[slot].views : views_of_all_);
  if (slot < 0) return;
  changes_.Note(slot);
  FinishDraining(slot);
}

void SlotTable::Unpin(const StateLock&, const Pins& pins) {
  for (const Sequence& sequence : pins.sequences) {
    const auto end = static_cast<std::int32_t>(sequence.end());  // at most max_seq_len
    if (pins.written_layer == Pins::kAllLayers) {
      progress_.RaiseWritten(sequence.slot, end);
    } else if (pins.written_layer != Pins::kNoLayer) {
      std::int32_t& written = progress_.Written(sequence.slot)[pins.written_layer];
      written = std::max(written, end);
    }
    --progress_.slots[sequence.slot].pins;
    FinishDraining(sequence.slot);
  }
  --progress_.running;
  changed_.notify_all();
}

void SlotTable::Close(const StateLock&) {
  closed_ = true;
  changed_.notify_all();
}

}  // namespace kvpage
