#include "cache/slot_table.h"

#include <algorithm>
#include <limits>

namespace kvpage {

SlotTable::SlotTable(const Geometry& geometry)
    : geometry_(geometry),
      slots_(geometry.max_slots),
      changes_(geometry.max_slots),
      commits_(geometry.max_slots),
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
    slots_[slot].released_at = ++releases_;
  } else {
    draining_.erase(slot);
  }
  changes_.Note(slot);
}

void SlotTable::Occupy(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  HostSlot& row = slots_[slot];
  SetState(slot, SlotState::kOccupied);
  row.reserved = tokens;
  row.truncations = 0;
  row.dropped = row.dropped_before = 0;
  row.forked = row.swapping = false;
  row.restored = -1;
  row.committed.clear();
  row.space = -1;
  row.prompt = row.found = row.fewest = 0;
  row.exact = std::numeric_limits<std::int64_t>::max();
  progress_.Reset(slot);
}

void SlotTable::Commit(const StateLock&, std::int32_t slot, const std::vector<std::int32_t>& token_ids) {
  HostSlot& row = slots_[slot];
  row.committed.insert(row.committed.end(), token_ids.begin(), token_ids.end());
  if (row.space >= 0) commits_.Note(slot);
}

void SlotTable::Reserve(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  if (tokens <= slots_[slot].reserved) return;
  slots_[slot].reserved = tokens;
  changes_.Note(slot);
}

std::int64_t SlotTable::Lendable(const StateLock&, std::int32_t donor, std::int64_t tokens) const {
  const HostSlot& row = slots_[donor];
  if (row.truncations > 0) tokens = std::min(tokens, row.truncated);
  return tokens - tokens % geometry_.block_tokens;
}

void SlotTable::OccupyFork(const StateLock& lock, std::int32_t slot, std::int32_t donor, std::int64_t tokens) {
  Occupy(lock, slot, 0);
  HostSlot& row = slots_[slot];
  const std::vector<std::int32_t>& ids = slots_[donor].committed;
  row.forked = true;
  row.committed.assign(ids.begin(), ids.begin() + tokens);
  row.space = slots_[donor].space;
  if (tokens > slots_[donor].exact) row.exact = slots_[donor].exact;
  if (row.space >= 0) commits_.Note(slot);
  progress_.slots[slot].shared = static_cast<std::int32_t>(Lendable(lock, donor, tokens));
}

void SlotTable::OccupyFound(const StateLock& lock, std::int32_t slot, std::int32_t space, const std::int32_t* ids,
                            std::int64_t found) {
  HostSlot& row = slots_[slot];
  // Remembers the tokens of a parked sequence after those found, for UndoFound.
  row.cut.clear();
  if (row.space == space && static_cast<std::int64_t>(row.committed.size()) > found) {
    row.cut.assign(row.committed.begin() + found, row.committed.end());
  }
  Occupy(lock, slot, 0);
  row.forked = found > 0;
  row.committed.assign(ids, ids + found);
  row.space = space;
  row.found = row.fewest = found;
  progress_.slots[slot].shared = static_cast<std::int32_t>(found);
}

void SlotTable::OccupySwapped(const StateLock& lock, std::int32_t slot, const std::vector<std::int32_t>& ids,
                              std::int32_t space, std::int64_t prompt, std::int64_t shared) {
  Occupy(lock, slot, 0);
  HostSlot& row = slots_[slot];
  row.restored = row.fewest = static_cast<std::int64_t>(ids.size());
  row.committed = ids;
  row.space = space;
  row.prompt = prompt;
  if (space >= 0) commits_.Note(slot);
  progress_.slots[slot].shared = static_cast<std::int32_t>(shared);
}

void SlotTable::UndoFound(const StateLock& lock, std::int32_t slot, bool whole) {
  HostSlot& row = slots_[slot];
  const std::int64_t end = geometry_.BlocksFor(row.found) * geometry_.block_tokens;
  if (!whole) row.cut.resize(std::min<std::int64_t>(row.cut.size(), end - row.found));
  SetState(slot, SlotState::kDraining);
  Vacate(lock, slot);
  RestoreCommitted(lock, slot);
  row.fewest = static_cast<std::int64_t>(row.committed.size());
}

void SlotTable::ForgetSequence(const StateLock&, std::int32_t slot) {
  HostSlot& row = slots_[slot];
  row.space = -1;
  row.committed = {};
}

void SlotTable::StartTruncation(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  HostSlot& row = slots_[slot];
  row.truncated = row.truncations++ > 0 ? std::min(row.truncated, tokens) : tokens;
}

void SlotTable::EndTruncation(const StateLock&, std::int32_t slot) {
  HostSlot& row = slots_[slot];
  row.truncations = std::max(row.truncations - 1, 0);
  if (row.space >= 0) commits_.Note(slot);
}

void SlotTable::StartDrop(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  HostSlot& row = slots_[slot];
  row.dropped_before = std::exchange(row.dropped, tokens);
}

void SlotTable::UndoDrop(const StateLock&, std::int32_t slot) {
  HostSlot& row = slots_[slot];
  row.dropped = std::max<std::int64_t>(row.dropped_before, progress_.slots[slot].dropped);
  if (row.space >= 0) commits_.Note(slot);
}

void SlotTable::NoteDropped(const StateLock&, std::int32_t slot, std::int32_t tokens) {
  std::int32_t& done = progress_.slots[slot].dropped;
  done = std::max(done, tokens);
  slots_[slot].dropped = std::max<std::int64_t>(slots_[slot].dropped, done);
}

void SlotTable::StartGeneration(const StateLock& lock, std::int32_t slot) {
  slots_[slot].truncations = 0;
  if (!Vacant(lock, slot)) {  // a sequence that has ended keeps what it has lost: its blocks may stay mapped
    slots_[slot].dropped = slots_[slot].dropped_before = progress_.slots[slot].dropped;
  }
  const bool never =
      slots_[slot].state == SlotState::kOccupied && slots_[slot].forked && !progress_.slots[slot].started;
  if (never) SetState(slot, SlotState::kDraining);
  const HostSlot& row = slots_[slot];
  if (row.state == SlotState::kOccupied && row.restored >= 0 && !progress_.slots[slot].started) {
    // The slot has had its sequence since the host swapped it in, whether or not the program has run.
    progress_.slots[slot].started = true;
    progress_.slots[slot].length = static_cast<std::int32_t>(row.restored);
    progress_.RaiseWritten(slot, static_cast<std::int32_t>(row.restored));
  }
  // A draining slot's release program belongs to the old generation and will be rejected, unless it has already run.
  if (slots_[slot].state == SlotState::kDraining && !progress_.slots[slot].vacated) Vacate(lock, slot);
}

void SlotTable::CutCommitted(const StateLock&, std::int32_t slot, std::int64_t tokens) {
  HostSlot& row = slots_[slot];
  const auto end = row.committed.begin() + std::min<std::int64_t>(tokens, row.committed.size());
  row.cut.assign(end, row.committed.end());
  row.committed.erase(end, row.committed.end());
  row.fewest = std::min<std::int64_t>(row.fewest, row.committed.size());
  row.found = std::min<std::int64_t>(row.found, row.committed.size());
  if (row.space >= 0) commits_.Note(slot);
}

void SlotTable::RestoreCommitted(const StateLock&, std::int32_t slot) {
  HostSlot& row = slots_[slot];
  row.committed.insert(row.committed.end(), row.cut.begin(), row.cut.end());
  row.cut.clear();
  if (row.space >= 0) commits_.Note(slot);
}

void SlotTable::Retract(const StateLock& lock, std::int32_t slot, std::int64_t reserved, std::int64_t committed) {
  HostSlot& row = slots_[slot];
  CutCommitted(lock, slot, committed);
  row.cut.clear();  // nothing can restore them
  row.reserved = std::min(row.reserved, reserved);
  changes_.Note(slot);
}

void SlotTable::Vacate(const StateLock&, std::int32_t slot, std::int64_t written) {
  HostSlot& row = slots_[slot];
  if (row.space >= 0 || row.swapping) {
    // The tokens found are in memory, whether or not the program that occupies the slot has run.
    if (written < 0) written = progress_.WrittenInAllLayers(slot);
    const auto committed = std::min<std::int64_t>(row.exact, row.committed.size());
    const std::int64_t kept = std::min(std::max(written, row.found), committed);
    row.committed.resize(kept);
    row.fewest = std::min(row.fewest, kept);
  }
  progress_.slots[slot].vacated = true;
  progress_.slots[slot].shared = progress_.slots[slot].dropped = 0;  // as on a device
  progress_.LowerWritten(slot, 0);
  FinishDraining(slot);
}

// The slot becomes free once nothing can access it any more.
void SlotTable::FinishDraining(std::int32_t slot) {
  HostSlot& row = slots_[slot];
  SlotProgress& progress = progress_.slots[slot];
  if (row.state != SlotState::kDraining || !progress.vacated || progress.pins > 0 || row.views > 0 || row.swapping) {
    return;
  }
  SetState(slot, SlotState::kFree);
  row.reserved = row.truncations = 0;
  if (row.space < 0) row.committed.clear();
  row.parked_at = ++parkings_;
  if (row.space >= 0) commits_.Note(slot);
  if (row.space >= 0 && on_parked_) on_parked_();
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
    progress_.slots[sequence.slot].by_block -= pins.by_block;
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
