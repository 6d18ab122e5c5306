// edit_slots on CPU: the one op that host verbs (acquire, release) queue. kernels/cuda/edit_slots.cu is its twin.
#include <algorithm>
#include <limits>
#include <string>

#include "cache/messages.h"
#include "cache/pool.h"

namespace kvpage {
namespace {

// What an edit makes of an occupied slot's length.
std::int32_t LengthAfter(const SlotEdit& edit) {
  switch (static_cast<SlotOpcode>(edit.opcode)) {
    case SlotOpcode::kOccupy:
      return 0;
    case SlotOpcode::kVacate:
      return -1;
    case SlotOpcode::kSetLength:
      return edit.length;
  }
  return -1;
}

}  // namespace

Status Pool::CheckEdit(const char* op, const CacheRef& cache, const SlotEdit& edit) {
  const std::int32_t slot = edit.slot;
  KVPAGE_RETURN_IF_ERROR(CheckSlot(op, cache, slot));
  const std::int32_t length = cache.lengths[slot];
  switch (static_cast<SlotOpcode>(edit.opcode)) {
    case SlotOpcode::kOccupy:
      // The host may be ahead and have released a slot again that is only now occupied here: draining is fine.
      if (length < 0 && slots_[slot].state != SlotState::kFree) return {};
      return messages::SlotTaken(op, slot, length >= 0 ? "already occupied in this cache" : "free in the pool");
    case SlotOpcode::kVacate:
      if (length < 0) return messages::SlotFree(op, slot);
      if (slots_[slot].state == SlotState::kDraining) return {};
      return FailedPrecondition(std::string(op) + ": slot " + std::to_string(slot) + " was not released by the host");
    case SlotOpcode::kSetLength:
      if (length < 0) return messages::SlotFree(op, slot);
      if (edit.length < 0 || edit.length > length) return messages::NotLowered(op, slot, edit.length, length);
      return {};
  }
  return messages::UnknownOpcode(op, slot, edit.opcode);
}

Status Pool::CheckCopySlot(const char* op, const CacheRef& cache, std::int32_t slot, std::int32_t length) {
  if (Before(cache.epoch, slots_[slot].since)) return messages::StaleSlot(op, slot, cache.epoch, slots_[slot].since);
  return length < 0 ? messages::SlotFree(op, slot) : Status();
}

Status Pool::CheckCopies(const char* op, const CacheRef& cache, const EditList& list) {
  if (list.num_copies == 0) return {};
  std::vector<std::int32_t> lengths(cache.lengths, cache.lengths + geometry_.max_slots);
  std::vector<std::int32_t> limits(geometry_.max_slots, std::numeric_limits<std::int32_t>::max());
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    if (list.edits[i].slot == -1) continue;
    lengths[list.edits[i].slot] = limits[list.edits[i].slot] = LengthAfter(list.edits[i]);
  }
  // Tokens written in every layer, once the edits are made.
  const auto written = [&](std::int32_t slot) { return std::min(slots_[slot].WrittenInAllLayers(), limits[slot]); };
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const TokenCopy& copy = list.copies[i];
    if (copy.source == -1) continue;
    for (const std::int32_t slot : {copy.source, copy.target}) {
      if (slot < 0 || slot >= geometry_.max_slots) return messages::SlotRange(op, slot, geometry_.max_slots);
    }
    for (const std::int32_t slot : {copy.source, copy.target}) {
      KVPAGE_RETURN_IF_ERROR(CheckCopySlot(op, cache, slot, lengths[slot]));
    }
    if (copy.first < 0 || copy.count < 0) return messages::CopyTokens(op, copy.target, copy.first, copy.count);
    if (copy.end() > geometry_.max_seq_len) {
      return messages::MaxSeqLen(op, copy.target, copy.end(), geometry_.max_seq_len);
    }
    for (const std::int32_t slot : {copy.source, copy.target}) {
      const std::int64_t room = Room(slots_[slot]);
      if (copy.end() > room) return messages::Unmapped(op, slot, copy.end(), room);
    }
    if (copy.end() > written(copy.source)) {
      return messages::UnwrittenSomewhere(op, copy.source, copy.end(), written(copy.source));
    }
    // A gap would show its reader what an earlier owner of the memory left there.
    if (copy.first > written(copy.target)) {
      return messages::UnwrittenSomewhere(op, copy.target, copy.first, written(copy.target));
    }
  }
  ++stamp_;
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    if (list.copies[i].source == -1) continue;
    std::uint64_t& seen = seen_[list.copies[i].target];
    if (seen == stamp_) return messages::CopyTwice(op, list.copies[i].target);
    seen = stamp_;
  }
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const std::int32_t source = list.copies[i].source;
    if (source != -1 && seen_[source] == stamp_) return messages::CopyChain(op, source);
  }
  return {};
}

Status Pool::EditSlots(const char* op, const CacheRef& cache, const EditList& list, PinnedSlots* pinned,
                       std::uint32_t* epoch, std::int32_t* lengths) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckGeneration(op, cache, true));
  ++stamp_;
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    if (list.edits[i].slot != -1) KVPAGE_RETURN_IF_ERROR(CheckEdit(op, cache, list.edits[i]));
  }
  KVPAGE_RETURN_IF_ERROR(CheckCopies(op, cache, list));

  const std::uint32_t next = NextEpoch();
  if (lengths != cache.lengths) std::copy_n(cache.lengths, geometry_.max_slots, lengths);
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (edit.slot == -1) continue;
    Slot& row = slots_[edit.slot];
    const auto opcode = static_cast<SlotOpcode>(edit.opcode);
    const std::int32_t length = LengthAfter(edit);
    if (opcode != SlotOpcode::kSetLength || length < lengths[edit.slot]) row.since = next;
    lengths[edit.slot] = length;
    if (opcode == SlotOpcode::kSetLength) {
      row.length = length;
      for (std::int32_t& written : row.written) written = std::min(written, length);
    }
    if (opcode != SlotOpcode::kVacate) continue;
    row.vacated = true;
    FinishDraining(edit.slot);
  }
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const TokenCopy& copy = list.copies[i];
    if (copy.source == -1) continue;
    pinned->sequences_.push_back({copy.source, 0, 0, 0});
    pinned->sequences_.push_back({copy.target, 0, copy.count, copy.first});
    slots_[copy.target].since = next;  // what an older cache shows of it may be overwritten
  }
  *epoch = next;
  if (pinned->sequences_.empty()) return {};
  pinned->pool_ = this;
  pinned->written_layer_ = PinnedSlots::kAllLayers;
  for (const Sequence& sequence : pinned->sequences_) ++slots_[sequence.slot].pins;
  ++running_;
  return {};
}

}  // namespace kvpage
