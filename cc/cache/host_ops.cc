#include "cache/host_ops.h"

#include <algorithm>
#include <string>

#include "cache/messages.h"
#include "cache/swapping.h"

namespace kvpage::host_ops {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Chooses a free slot for each request. Changes nothing.
Claim ChooseSlots(const PoolParts& pool, const MappingLock& mapping, const std::vector<std::int64_t>& tokens,
                  std::vector<Want>* wants) {
  std::vector<std::int64_t> blocks;
  blocks.reserve(tokens.size());
  for (const std::int64_t n : tokens) blocks.push_back(pool.table->geometry().BlocksFor(n));
  const std::vector<std::int32_t> slots = pool.supply->BestFits(mapping, blocks);
  if (slots.size() < tokens.size()) {
    Claim claim = FailedClaim(ResourceExhausted("no free slot", Reason::kOutOfSlots));
    claim.wanted = static_cast<std::int64_t>(tokens.size());
    claim.free = static_cast<std::int64_t>(slots.size());
    claim.draining = pool.table->NumDraining(pool.table->Lock());
    return claim;
  }
  wants->reserve(slots.size());
  for (std::size_t i = 0; i < slots.size(); ++i) wants->push_back({slots[i], blocks[i]});
  return {};
}

// Blanks the memory that the slots had before the plan was applied. Supply blanks the blocks that it adds.
Status BlankAdopted(const PoolParts& pool, const MappingLock& mapping, const SupplyPlan& plan) {
  for (const Grant& grant : plan.grants) {
    const std::int64_t end = std::min(grant.before, pool.supply->arena(mapping).blocks(grant.slot));
    KVPAGE_RETURN_IF_ERROR(pool.supply->Blank(mapping, grant.slot, 0, end));
  }
  return {};
}

// Checks that each slot is occupied and named only once.
Status CheckSlots(SlotTable* table, const StateLock& state, const char* op, const std::vector<std::int32_t>& slots) {
  table->StartNaming(state);
  for (const std::int32_t slot : slots) {
    KVPAGE_RETURN_IF_ERROR(table->CheckOccupied(state, op, slot));
    if (!table->Name(state, slot)) {
      return InvalidArgument(std::string(op) + ": slot " + Number(slot) + " is named twice");
    }
  }
  return {};
}

// The checks and choices of acquiring, before anything changes: a free slot and a number of blocks for each request.
Claim ChooseChecked(const PoolParts& pool, const MappingLock& mapping, const char* op,
                    const std::vector<std::int64_t>& tokens, std::vector<Want>* wants) {
  if (Status status = Enter(pool, pool.table->Lock(), op); !status.ok()) return FailedClaim(status);
  const std::int64_t max_seq_len = pool.table->geometry().max_seq_len;
  for (const std::int64_t n : tokens) {
    if (n >= 0 && n <= max_seq_len) continue;
    return FailedClaim(InvalidArgument(std::string(op) + ": num_tokens is " + Number(n) + ", wanted 0.." +
                                       Number(max_seq_len) + " (max_seq_len)"));
  }
  return ChooseSlots(pool, mapping, tokens, wants);
}

}  // namespace

Claim CanAcquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens) {
  const MappingLock mapping = pool.supply->Lock();
  std::vector<Want> wants;
  if (Claim claim = ChooseChecked(pool, mapping, "can_acquire", tokens, &wants); !claim.status.ok()) return claim;
  // Memory that a slot must give up before it gets a new owner counts like any other unneeded memory.
  std::vector<Want> kept;
  std::int64_t given_up = 0;
  for (const Want& want : wants) {
    if (pool.supply->GivesUp(mapping, want.slot)) {
      given_up += want.blocks * pool.table->geometry().num_ranges();
    } else {
      kept.push_back(want);
    }
  }
  SupplyPlan plan;
  Claim claim = pool.supply->Plan(mapping, kept, Source::kFree, &plan);
  if (given_up == 0 || !claim.status.ok()) return claim;
  claim.wanted += given_up;
  pool.supply->Tally(mapping, kept, &claim);
  if (claim.wanted > claim.free + claim.reclaimable) {
    claim.status = ResourceExhausted(Number(claim.wanted) + " blocks wanted", Reason::kOutOfBlocks);
  }
  return claim;
}

Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  std::vector<Want> wants;
  if (Claim claim = ChooseChecked(pool, mapping, "acquire", tokens, &wants); !claim.status.ok()) return claim;
  for (const Want& want : wants) {
    if (Status status = pool.supply->DropShared(mapping, want.slot); !status.ok()) return FailedClaim(status);
  }
  SupplyPlan plan;
  Claim claim = pool.supply->Reserve(mapping, wants, &plan);
  if (!claim.status.ok()) return claim;
  claim.status = BlankAdopted(pool, mapping, plan);
  if (!claim.status.ok()) {
    pool.supply->Undo(mapping, plan);
    return claim;
  }
  claim.status = PublishRoom(pool, mapping, plan);
  if (!claim.status.ok()) return claim;
  const StateLock state = table.Lock();
  for (std::size_t i = 0; i < wants.size(); ++i) {
    table.Occupy(state, wants[i].slot, tokens[i]);
    if (pool.mirror != nullptr) pool.mirror->ClearVacated(wants[i].slot);
    claim.slots.push_back(wants[i].slot);
  }
  return claim;
}

Claim Extend(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const auto check = [&](const StateLock& state) -> Status {
    KVPAGE_RETURN_IF_ERROR(Enter(pool, state, "extend"));
    KVPAGE_RETURN_IF_ERROR(CheckSlots(&table, state, "extend", slots));
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] > geometry.max_seq_len) {
        return messages::MaxSeqLen("extend", slots[i], tokens[i], geometry.max_seq_len);
      }
    }
    return {};
  };
  {
    const StateLock state = table.Lock();
    if (Status status = check(state); !status.ok()) return FailedClaim(status);
    bool enough = true;
    for (std::size_t i = 0; i < slots.size(); ++i) enough &= tokens[i] <= table.host(state, slots[i]).reserved;
    if (enough) return {};
  }
  const MappingLock mapping = pool.supply->Lock();
  std::vector<Want> wants;
  {
    const StateLock state = table.Lock();
    if (Status status = check(state); !status.ok()) return FailedClaim(status);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const std::int64_t total = std::max(tokens[i], table.host(state, slots[i]).reserved);
      wants.push_back({slots[i], geometry.BlocksFor(total)});
    }
  }
  SupplyPlan plan;
  Claim claim = pool.supply->Reserve(mapping, wants, &plan);
  if (claim.status.ok()) claim.status = PublishRoom(pool, mapping, plan);
  if (!claim.status.ok()) return claim;
  const StateLock state = table.Lock();
  for (std::size_t i = 0; i < slots.size(); ++i) {
    // A release may have begun meanwhile; then the memory is parked with the slot.
    if (table.host(state, slots[i]).state == SlotState::kOccupied) table.Reserve(state, slots[i], tokens[i]);
  }
  return claim;
}

Status StartEdits(const PoolParts& pool, const char* verb, const std::vector<SlotEdit>& edits) {
  SlotTable& table = *pool.table;
  std::vector<std::int32_t> slots;
  for (const SlotEdit& edit : edits) {
    slots.push_back(edit.slot);
    if (edit.opcode == static_cast<std::int32_t>(SlotOpcode::kVacate)) continue;
    return InvalidArgument(std::string(verb) + ": slot " + Number(edit.slot) +
                           ": the host decides nothing for opcode " + Number(edit.opcode));
  }
  const StateLock state = table.Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, verb));
  KVPAGE_RETURN_IF_ERROR(CheckSlots(&table, state, verb, slots));
  for (const std::int32_t slot : slots) table.StartDraining(state, slot);
  return {};
}

void UndoEdits(const PoolParts& pool, const std::vector<SlotEdit>& edits) {
  const MappingLock mapping = pool.supply->Lock();
  for (const SlotEdit& edit : edits) {
    const StateLock state = pool.table->Lock();
    const HostSlot& row = pool.table->host(state, edit.slot);
    const bool vacated = pool.table->progress(state).slots[edit.slot].vacated;
    const bool occupied = row.state == SlotState::kOccupied;  // otherwise a new generation has undone it
    switch (static_cast<SlotOpcode>(edit.opcode)) {
      case SlotOpcode::kOccupy:
      case SlotOpcode::kFork:
        if (!occupied) break;
        pool.table->StartDraining(state, edit.slot);
        pool.table->Vacate(state, edit.slot);
        break;
      case SlotOpcode::kFound:
        if (occupied) pool.table->UndoFound(state, edit.slot);
        break;
      case SlotOpcode::kVacate:
        if (row.state != SlotState::kDraining || vacated) break;
        if (row.swapping) swapping::UndoOut(pool, mapping, edit.slot);
        pool.table->CancelDraining(state, edit.slot);
        break;
      case SlotOpcode::kTruncate:
        if (row.state != SlotState::kOccupied) break;
        pool.table->RestoreCommitted(state, edit.slot);
        pool.table->EndTruncation(state, edit.slot);
        break;
      case SlotOpcode::kDrop:
        // With a mirror the blocks have already been unmapped.
        if (row.state == SlotState::kOccupied && pool.mirror == nullptr) pool.table->UndoDrop(state, edit.slot);
        break;
      case SlotOpcode::kSetLength:
      case SlotOpcode::kSwapIn:  // swapping::UndoIn
        break;
    }
  }
  pool.supply->DropStaleSetAside(mapping);
}

Status Retract(const PoolParts& pool, std::int32_t slot, std::int64_t reserved, std::int64_t committed) {
  SlotTable& table = *pool.table;
  const MappingLock mapping = pool.supply->Lock();
  std::int64_t room = 0;
  bool stop = false;
  {
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, "retract", slot));
    const Geometry& geometry = table.geometry();
    room =
        std::min(geometry.BlocksFor(std::max<std::int64_t>(reserved, 0)) * geometry.block_tokens, geometry.max_seq_len);
    stop = pool.mirror != nullptr && room < table.Room(state, slot);
    if (stop) table.progress(state).slots[slot].by_block = 1;  // until the new room is published
  }
  // A program may have read the old room. If programs cannot be stopped, the slot keeps the room.
  if (stop) KVPAGE_RETURN_IF_ERROR(pool.mirror->StopReaders({{slot, static_cast<std::int32_t>(room)}}));
  {
    const StateLock state = table.Lock();
    table.Retract(state, slot, std::max<std::int64_t>(reserved, 0), std::max<std::int64_t>(committed, 0));
  }
  return stop ? PublishSlots(pool, mapping, {slot}, /*stopped=*/true) : Status();
}

Status Commit(const PoolParts& pool, std::int32_t slot, const std::vector<std::int32_t>& token_ids) {
  SlotTable& table = *pool.table;
  const StateLock state = table.Lock();
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, "commit"));
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, "commit", slot));
  const auto wanted = static_cast<std::int64_t>(table.host(state, slot).committed.size() + token_ids.size());
  const std::int64_t room = table.Room(state, slot);
  if (wanted > room) {
    return OutOfRange("commit: slot " + Number(slot) + ": " + Number(wanted) + " tokens wanted, " + Number(room) +
                      " mapped: extend the slot before its tokens are written");
  }
  table.Commit(state, slot, token_ids);
  return {};
}

std::vector<std::int32_t> Committed(const PoolParts& pool, std::int32_t slot) {
  const StateLock state = pool.table->Lock();
  if (!pool.table->CheckOccupied(state, "commit", slot).ok()) return {};
  return pool.table->host(state, slot).committed;
}

}  // namespace kvpage::host_ops
