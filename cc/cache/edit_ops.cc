// kernels/cuda/edit_slots.cu makes the same checks and changes on a device.
#include "cache/edit_ops.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cache/dropping.h"
#include "cache/messages.h"
#include "cache/program_check.h"
#include "cache/sharing.h"
#include "cache/swapping.h"

namespace kvpage::edit_ops {
namespace {

// The length of an occupied slot after an edit.
std::int32_t LengthAfter(const SlotEdit& edit) {
  switch (static_cast<SlotOpcode>(edit.opcode)) {
    case SlotOpcode::kOccupy:
      return 0;
    case SlotOpcode::kVacate:
      return -1;
    case SlotOpcode::kSetLength:
    case SlotOpcode::kFork:
    case SlotOpcode::kTruncate:
    case SlotOpcode::kFound:
    case SlotOpcode::kSwapIn:
      return edit.length;
    case SlotOpcode::kDrop:  // does not change the length: callers do not ask
      break;
  }
  return -1;
}

bool Is(const SlotEdit& edit, SlotOpcode opcode) { return edit.opcode == static_cast<std::int32_t>(opcode); }

// The number of tokens in full blocks.
std::int32_t WholeBlocks(const Geometry& geometry, std::int32_t tokens) {
  return tokens - tokens % static_cast<std::int32_t>(geometry.block_tokens);
}

// `length` is the slot's length in the cache.
Status CheckEdit(const char* op, SlotState host, std::int32_t length, DeviceProgress* progress, const SlotEdit& edit) {
  const std::int32_t slot = edit.slot;
  switch (static_cast<SlotOpcode>(edit.opcode)) {
    case SlotOpcode::kOccupy:
    case SlotOpcode::kFork:
    case SlotOpcode::kFound:
    case SlotOpcode::kSwapIn:
      // The host may already have released a slot again that is only now occupied here, so draining is allowed.
      if (length < 0 && host != SlotState::kFree) return {};
      return messages::SlotTaken(op, slot, length >= 0 ? "already occupied in this cache" : "free in the pool");
    case SlotOpcode::kVacate:
      if (length < 0) return messages::SlotFree(op, slot);
      if (host == SlotState::kDraining) return {};
      return FailedPrecondition(std::string(op) + ": slot " + std::to_string(slot) + " was not released by the host");
    case SlotOpcode::kSetLength:
    case SlotOpcode::kTruncate:
      if (length < 0) return messages::SlotFree(op, slot);
      if (edit.length < 0 || edit.length > length) return messages::NotLowered(op, slot, edit.length, length);
      if (const std::int32_t dropped = progress->slots[slot].dropped; edit.length < dropped) {
        return messages::BelowDropped(op, slot, edit.length, dropped);
      }
      if (edit.length > progress->WrittenInAllLayers(slot)) {
        return messages::UnwrittenSomewhere(op, slot, edit.length, progress->Runs(slot));
      }
      return {};
    case SlotOpcode::kDrop:
      if (length < 0) return messages::SlotFree(op, slot);
      return edit.length > length ? messages::DropBeyond(op, slot, edit.length, length) : Status();
  }
  return messages::UnknownOpcode(op, slot, edit.opcode);
}

// Checks that the donor has the tokens that the fork takes. The slots of all edits must have been named.
Status CheckFork(SlotTable* table, const StateLock& state, const ProgramCheck& check, const char* op,
                 const CacheRef& cache, const SlotEdit& edit) {
  const std::int32_t donor = edit.donor;
  if (donor < 0 || donor >= table->num_slots()) return messages::SlotRange(op, donor, table->num_slots());
  if (table->Named(state, donor)) return messages::DonorEdited(op, edit.slot, donor);
  KVPAGE_RETURN_IF_ERROR(check.Fresh(donor));
  if (cache.lengths[donor] < 0) return messages::SlotFree(op, donor);
  const std::int64_t room = table->Room(state, edit.slot);
  if (edit.length < 0 || edit.length > room) return messages::Unmapped(op, edit.slot, edit.length, room);
  DeviceProgress& progress = table->progress(state);
  if (edit.length > progress.WrittenInAllLayers(donor)) {
    return messages::UnwrittenSomewhere(op, donor, edit.length, progress.Runs(donor));
  }
  return {};
}

// Checks that each target is used by one copy only, and is not the source of any copy.
Status CheckTargets(SlotTable* table, const StateLock& state, const char* op, const EditList& list) {
  table->StartNaming(state);
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const TokenCopy& copy = list.copies[i];
    if (copy.source != -1 && !table->Name(state, copy.target)) return messages::CopyTwice(op, copy.target);
  }
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const std::int32_t source = list.copies[i].source;
    if (source != -1 && table->Named(state, source)) return messages::CopyChain(op, source);
  }
  return {};
}

Status CheckCopies(SlotTable* table, const StateLock& state, const ProgramCheck& check, const char* op,
                   const CacheRef& cache, const EditList& list) {
  if (list.num_copies == 0) return {};
  const Geometry& geometry = table->geometry();
  std::vector<std::int32_t> lengths(cache.lengths, cache.lengths + geometry.max_slots);
  std::vector<std::int32_t> limits(geometry.max_slots, std::numeric_limits<std::int32_t>::max());
  std::vector<std::int32_t> forked(geometry.max_slots, 0);  // tokens that are already in the memory of a new sequence
  DeviceProgress& progress = table->progress(state);
  std::vector<std::int32_t> shared;
  for (const SlotProgress& slot : progress.slots) shared.push_back(slot.shared);
  std::vector<std::int32_t> dropped;
  for (const SlotProgress& slot : progress.slots) dropped.push_back(slot.dropped);
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (edit.slot == -1) continue;
    if (Is(edit, SlotOpcode::kDrop)) {
      dropped[edit.slot] = std::max(dropped[edit.slot], edit.length);
      continue;
    }
    lengths[edit.slot] = limits[edit.slot] = LengthAfter(edit);
    if (Is(edit, SlotOpcode::kOccupy)) shared[edit.slot] = 0;
    if (Is(edit, SlotOpcode::kFound)) shared[edit.slot] = forked[edit.slot] = edit.length;
    if (Is(edit, SlotOpcode::kSwapIn)) forked[edit.slot] = edit.length;
    if (Is(edit, SlotOpcode::kFork)) forked[edit.slot] = shared[edit.slot];  // as mapped by the host
    if (Is(edit, SlotOpcode::kTruncate)) {
      shared[edit.slot] = std::min(shared[edit.slot], WholeBlocks(geometry, edit.length));
    }
  }
  // Tokens written in every layer after the edits.
  const auto written = [&](std::int32_t slot) {
    return std::max(std::min(progress.WrittenInAllLayers(slot), limits[slot]), forked[slot]);
  };
  const auto unwritten = [&](std::int32_t slot, std::int64_t wanted) {
    return messages::UnwrittenSomewhere(op, slot, wanted, progress.Runs(slot, limits[slot]));
  };
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const TokenCopy& copy = list.copies[i];
    if (copy.source == -1) continue;
    for (const std::int32_t slot : {copy.source, copy.target}) {
      if (slot < 0 || slot >= geometry.max_slots) return messages::SlotRange(op, slot, geometry.max_slots);
    }
    for (const std::int32_t slot : {copy.source, copy.target}) {
      KVPAGE_RETURN_IF_ERROR(check.Fresh(slot));
      if (lengths[slot] < 0) return messages::SlotFree(op, slot);
    }
    if (copy.first < 0 || copy.count < 0) return messages::CopyTokens(op, copy.target, copy.first, copy.count);
    if (copy.end() > geometry.max_seq_len) {
      return messages::MaxSeqLen(op, copy.target, copy.end(), geometry.max_seq_len);
    }
    for (const std::int32_t slot : {copy.source, copy.target}) {
      const std::int64_t room = table->Room(state, slot);
      if (copy.end() > room) return messages::Unmapped(op, slot, copy.end(), room);
    }
    for (const std::int32_t slot : {copy.source, copy.target}) {
      if (copy.count > 0 && copy.first < dropped[slot]) return messages::Dropped(op, slot, copy.first, dropped[slot]);
    }
    if (copy.count > 0 && copy.first < shared[copy.target]) {
      return messages::Shared(op, copy.target, copy.first, shared[copy.target]);
    }
    if (copy.end() > written(copy.source)) return unwritten(copy.source, copy.end());
    // A gap would expose data of an earlier owner of the memory.
    if (copy.first > written(copy.target)) return unwritten(copy.target, copy.first);
  }
  return CheckTargets(table, state, op, list);
}

// The part of EditSlots for which the state mutex is held.
Status MakeEdits(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list,
                 PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths) {
  SlotTable& table = *pool.table;
  StateLock state = table.Lock();
  if (list.num_copies > 0) table.PassGate(&state);
  const ProgramCheck check(pool, state, op, cache);
  KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/true));
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (edit.slot == -1) continue;
    KVPAGE_RETURN_IF_ERROR(check.Slot(edit.slot));
    KVPAGE_RETURN_IF_ERROR(
        CheckEdit(op, table.host(state, edit.slot).state, cache.lengths[edit.slot], &table.progress(state), edit));
  }
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (edit.slot == -1) continue;
    if (Is(edit, SlotOpcode::kFork)) KVPAGE_RETURN_IF_ERROR(CheckFork(&table, state, check, op, cache, edit));
    if (!Is(edit, SlotOpcode::kFound) && !Is(edit, SlotOpcode::kSwapIn)) continue;
    const std::int64_t room = table.Room(state, edit.slot);
    if (edit.length < 0 || edit.length > room) return messages::Unmapped(op, edit.slot, edit.length, room);
    if (const HostSlot& row = table.host(state, edit.slot);
        Is(edit, SlotOpcode::kSwapIn) && row.restored != edit.length) {
      return FailedPrecondition(std::string(op) + ": slot " + std::to_string(edit.slot) + " was not swapped in with " +
                                std::to_string(edit.length) + " tokens");
    }
  }
  KVPAGE_RETURN_IF_ERROR(CheckCopies(&table, state, check, op, cache, list));

  DeviceProgress& progress = table.progress(state);
  const std::uint32_t next = progress.NextEpoch();
  if (lengths != cache.lengths) std::copy_n(cache.lengths, table.num_slots(), lengths);
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (edit.slot == -1) continue;
    SlotProgress& row = progress.slots[edit.slot];
    const auto opcode = static_cast<SlotOpcode>(edit.opcode);
    if (opcode == SlotOpcode::kDrop) {
      table.NoteDropped(state, edit.slot, edit.length);
      continue;
    }
    const std::int32_t length = LengthAfter(edit);
    const bool lowers = opcode == SlotOpcode::kSetLength || opcode == SlotOpcode::kTruncate;
    if (!lowers || length < lengths[edit.slot]) row.since = next;
    lengths[edit.slot] = length;
    if (lowers) progress.LowerWritten(edit.slot, length);
    if (opcode == SlotOpcode::kTruncate) row.shared = std::min(row.shared, WholeBlocks(table.geometry(), length));
    if (opcode == SlotOpcode::kFork) {
      // Takes effect only now, because programs queued earlier may still have to write these tokens.
      progress.slots[edit.donor].shared = std::max(progress.slots[edit.donor].shared, row.shared);
      progress.RaiseWritten(edit.slot, row.shared);
    }
    if (opcode == SlotOpcode::kFound) {
      row.shared = length;
      progress.RaiseWritten(edit.slot, length);
    }
    if (opcode == SlotOpcode::kSwapIn) progress.RaiseWritten(edit.slot, length);  // the host has set `shared`
    if (opcode == SlotOpcode::kVacate) {
      table.Vacate(state, edit.slot);
    } else {
      row.length = length;
      row.started = true;
    }
  }
  Pins pins;
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const TokenCopy& copy = list.copies[i];
    if (copy.source == -1) continue;
    pins.sequences.push_back({copy.source, 0, 0, 0});
    pins.sequences.push_back({copy.target, 0, copy.count, copy.first});
    progress.slots[copy.target].since = next;  // the tokens that an older cache shows may be overwritten
  }
  *epoch = next;
  if (pins.sequences.empty()) return {};
  pins.written_layer = Pins::kAllLayers;
  pinned->Pin(state, &table, std::move(pins));
  return {};
}

}  // namespace

Status EditSlots(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list,
                 PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths) {
  KVPAGE_RETURN_IF_ERROR(sharing::Separate(pool, op, cache, list));
  KVPAGE_RETURN_IF_ERROR(MakeEdits(pool, op, cache, list, pinned, epoch, lengths));
  dropping::Unmap(pool, list);
  swapping::Continue(pool, list);
  return {};
}

}  // namespace kvpage::edit_ops
