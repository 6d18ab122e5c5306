#include "cache/sharing.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache/messages.h"
#include "cache/placing.h"
#include "cache/program_check.h"

namespace kvpage::sharing {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

std::string Named(const char* verb, std::int32_t slot) { return std::string(verb) + ": slot " + Number(slot); }

std::int64_t NumCommitted(const SlotTable& table, const StateLock& state, std::int32_t slot) {
  return static_cast<std::int64_t>(table.host(state, slot).committed.size());
}

// Fills in requests[i].tokens.
Status CheckFork(SlotTable* table, const StateLock& state, const char* verb, std::vector<ForkRequest>* requests,
                 const std::vector<std::int32_t>& released) {
  table->StartNaming(state);
  for (const std::int32_t slot : released) {
    KVPAGE_RETURN_IF_ERROR(table->CheckOccupied(state, verb, slot));
    if (!table->Name(state, slot)) return InvalidArgument(Named(verb, slot) + " is named twice");
  }
  for (ForkRequest& request : *requests) {
    KVPAGE_RETURN_IF_ERROR(table->CheckOccupied(state, verb, request.donor));
    if (table->Named(state, request.donor)) {
      return InvalidArgument(Named(verb, request.donor) + " is released by the same call");
    }
    if (const std::int64_t dropped = table->host(state, request.donor).dropped; dropped > 0) {
      return FailedPrecondition(Named(verb, request.donor) + " has dropped its tokens below " + Number(dropped) +
                                " (pool.drop_before): fork a sequence before that");
    }
    const std::int64_t committed = NumCommitted(*table, state, request.donor);
    if (request.tokens < 0) request.tokens = committed;
    if (request.tokens > committed) {
      return OutOfRange(Named(verb, request.donor) + ": " + Number(request.tokens) + " tokens wanted, " +
                        Number(committed) + " committed: commit(slot, token_ids) names tokens that are written");
    }
  }
  return {};
}

// Maps what the forks share, and claims a block for what they copy.
Claim MapForks(const PoolParts& pool, const MappingLock& mapping, const std::vector<ForkRequest>& requests,
               const std::vector<std::int32_t>& slots) {
  const Geometry& geometry = pool.table->geometry();
  std::vector<Want> wants;
  std::vector<Supply::AliasRun> aliases;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const auto [donor, tokens] = requests[i];
    const std::int64_t lendable = pool.table->Lendable(pool.table->Lock(), donor, tokens);
    aliases.push_back({slots[i], pool.supply->arena(mapping).map(donor), lendable / geometry.block_tokens});
    wants.push_back({slots[i], geometry.BlocksFor(tokens)});
  }
  if (Status status = pool.supply->Alias(mapping, aliases); !status.ok()) return FailedClaim(status);
  SupplyPlan plan;
  return pool.supply->Reserve(mapping, wants, &plan);
}

// The blocks of a slot from `begin` on.
struct Tail {
  std::int32_t slot = 0;
  std::int64_t begin = 0;
};

// Makes the blocks of these tails private to the slots, and updates the mirror. While blocks are being replaced, no
// program may read them, including those of other threads, so the tail has no room meanwhile. The slot keeps the old
// blocks until the mirror has the new numbers (supply_tables.cc), because programs may find them by number.
Status SeparateOnDevice(const PoolParts& pool, const MappingLock& mapping, const std::vector<Tail>& tails) {
  SlotTable& table = *pool.table;
  std::vector<std::int32_t> slots;
  std::vector<Mirror::Room> stopped;
  {
    const StateLock state = table.Lock();
    for (const auto& [slot, begin] : tails) {
      slots.push_back(slot);
      std::int32_t& unpublished = table.progress(state).slots[slot].by_block;
      if (unpublished != 0 || pool.supply->arena(mapping).HasSetAside(slot)) {
        stopped.push_back({slot, static_cast<std::int32_t>(begin * table.geometry().block_tokens)});
      }
      unpublished = 1;
    }
    table.CountWait(state);  // the caller has waited for the programs of the slots
  }
  Status status = stopped.empty() ? Status() : pool.mirror->StopReaders(stopped);
  for (const auto& [slot, begin] : tails) {
    if (status.ok()) status = pool.supply->Separate(mapping, slot, begin);
  }
  const Status published = PublishSlots(pool, mapping, slots, /*stopped=*/true);  // some may have been replaced
  return status.ok() ? published : status;
}

Status CheckTruncate(SlotTable* table, const StateLock& state, const std::vector<std::int32_t>& slots,
                     const std::vector<std::int64_t>& tokens) {
  table->StartNaming(state);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    KVPAGE_RETURN_IF_ERROR(table->CheckOccupied(state, "truncate", slots[i]));
    if (!table->Name(state, slots[i])) return InvalidArgument(Named("truncate", slots[i]) + " is named twice");
    const std::int64_t room = table->Room(state, slots[i]);
    if (tokens[i] < 0 || tokens[i] > room) {
      return OutOfRange(Named("truncate", slots[i]) + ": num_tokens is " + Number(tokens[i]) + ", wanted 0.." +
                        Number(room) + ", for which there is room");
    }
    if (const std::int64_t dropped = table->host(state, slots[i]).dropped; tokens[i] < dropped) {
      return messages::BelowDropped("truncate", slots[i], tokens[i], dropped);
    }
  }
  return {};
}

}  // namespace

Claim Fork(const PoolParts& pool, const char* verb, const std::vector<ForkRequest>& asked,
           const std::vector<std::int32_t>& released) {
  SlotTable& table = *pool.table;
  std::vector<ForkRequest> requests = asked;
  const MappingLock mapping = pool.supply->Lock();
  {
    const StateLock state = table.Lock();
    if (Status status = Enter(pool, state, verb); !status.ok()) return FailedClaim(status);
    if (Status status = CheckFork(&table, state, verb, &requests, released); !status.ok()) return FailedClaim(status);
  }
  Claim empty = placing::EmptySlots(pool, mapping, requests.size());
  if (!empty.status.ok()) return empty;
  const std::vector<std::int32_t> slots = std::move(empty.slots);
  {
    // Before anything is mapped, so that no claim uses the slots as parked ones. Checked again, because another thread
    // may have released a donor meanwhile; this cannot happen while the lock is held.
    const StateLock state = table.Lock();
    if (Status status = CheckFork(&table, state, verb, &requests, released); !status.ok()) return FailedClaim(status);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      table.OccupyFork(state, slots[i], requests[i].donor, requests[i].tokens);
    }
  }
  Claim claim = MapForks(pool, mapping, requests, slots);
  if (claim.status.ok()) {
    const StateLock state = table.Lock();
    for (std::size_t i = 0; i < slots.size(); ++i) table.Reserve(state, slots[i], requests[i].tokens);
  }
  if (claim.status.ok()) claim.status = PublishSlots(pool, mapping, slots);
  if (!claim.status.ok()) {
    for (const std::int32_t slot : slots) static_cast<void>(pool.supply->arena(mapping).Shrink(slot, 0));
  }
  const StateLock state = table.Lock();
  if (!claim.status.ok()) {
    for (const std::int32_t slot : slots) {
      table.StartDraining(state, slot);
      table.Vacate(state, slot);
    }
    return claim;
  }
  claim.slots = slots;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    claim.tokens.push_back(requests[i].tokens);
    claim.shared.push_back(table.progress(state).slots[slots[i]].shared);
    if (pool.mirror != nullptr) pool.mirror->ClearVacated(slots[i]);
  }
  for (const std::int32_t slot : released) {
    // Another thread may have released it meanwhile; one of the two programs will fail.
    if (table.host(state, slot).state == SlotState::kOccupied) table.StartDraining(state, slot);
  }
  return claim;
}

Status SharesBehind(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out) {
  const MappingLock mapping = pool.supply->Lock();
  {
    const StateLock state = pool.table->Lock();
    KVPAGE_RETURN_IF_ERROR(Enter(pool, state, "truncate"));
    KVPAGE_RETURN_IF_ERROR(pool.table->CheckOccupied(state, "truncate", slot));
  }
  const std::int64_t begin = std::max<std::int64_t>(tokens, 0) / pool.table->geometry().block_tokens;
  // With a mirror: blocks replaced by a failed call still have to be published.
  const bool unpublished = pool.mirror != nullptr && pool.table->progress(pool.table->Lock()).slots[slot].by_block != 0;
  *out = unpublished || begin < pool.supply->arena(mapping).SharedBlocks(slot);
  return {};
}

Claim Truncate(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
  SlotTable& table = *pool.table;
  const std::int64_t block_tokens = table.geometry().block_tokens;
  const MappingLock mapping = pool.supply->Lock();
  {
    const StateLock state = table.Lock();
    if (Status status = Enter(pool, state, "truncate"); !status.ok()) return FailedClaim(status);
    if (Status status = CheckTruncate(&table, state, slots, tokens); !status.ok()) return FailedClaim(status);
  }
  std::vector<std::int64_t> begins;
  for (const std::int64_t count : tokens) begins.push_back(count / block_tokens);
  Arena& arena = pool.supply->arena(mapping);
  const auto shares = [&](std::size_t i) { return arena.SharedBlocks(slots[i]) > begins[i]; };
  bool any_shares = false;
  for (std::size_t i = 0; i < slots.size(); ++i) any_shares |= shares(i);
  if (any_shares) {
    // Blocks shared only with free slots need no copy.
    if (Status status = pool.supply->DropFreeShared(mapping); !status.ok()) return FailedClaim(status);
  }
  pool.supply->SyncIndex(mapping);
  const auto owns = [&](std::int32_t slot, std::int64_t block) {
    return pool.supply->index(mapping) != nullptr && pool.supply->index(mapping)->Owns(slot, block);
  };
  std::vector<std::vector<std::int64_t>> logical = arena.Missing(slots, begins, owns, /*hold=*/pool.mirror != nullptr);
  std::vector<Supply::SetAsideBlocks> missing;
  for (std::size_t i = 0; i < slots.size(); ++i) missing.push_back({slots[i], std::move(logical[i])});
  Claim claim = pool.supply->SetAside(mapping, missing);
  if (!claim.status.ok()) return claim;
  claim.slots = slots;
  // Tokens that will be written again must not be found. If the rest fails or is undone, the next lookup stores the
  // tokens again. No lookup happens before the committed tokens are cut, too.
  for (std::size_t i = 0; i < slots.size(); ++i) {
    pool.supply->CutIndex(mapping, slots[i], tokens[i]);
    table.NoteCommit(table.Lock(), slots[i]);
  }
  std::vector<Tail> tails;
  for (std::size_t i = 0; pool.mirror != nullptr && i < slots.size(); ++i) {
    const bool unpublished = table.progress(table.Lock()).slots[slots[i]].by_block != 0;  // by a failed call
    if (shares(i) || !missing[i].logical.empty() || unpublished) tails.push_back({slots[i], begins[i]});
  }
  if (!tails.empty()) claim.status = SeparateOnDevice(pool, mapping, tails);
  if (!claim.status.ok()) return claim;
  const StateLock state = table.Lock();
  for (std::size_t i = 0; i < slots.size(); ++i) {
    table.CutCommitted(state, slots[i], tokens[i]);
    if (pool.mirror == nullptr) table.StartTruncation(state, slots[i], tokens[i]);  // else all is already replaced
  }
  return claim;
}

Status Separate(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list) {
  SlotTable& table = *pool.table;
  const std::int64_t block_tokens = table.geometry().block_tokens;
  const auto truncates = [](const SlotEdit& edit) {
    return edit.slot != -1 && edit.opcode == static_cast<std::int32_t>(SlotOpcode::kTruncate);
  };
  if (std::none_of(list.edits, list.edits + list.num_edits, truncates)) return {};
  const MappingLock mapping = pool.supply->Lock();
  {
    const StateLock state = table.Lock();
    const ProgramCheck check(pool, state, op, cache);
    KVPAGE_RETURN_IF_ERROR(check.Begin(/*mutates=*/true));
    for (std::int64_t i = 0; i < list.num_edits; ++i) {
      if (truncates(list.edits[i])) KVPAGE_RETURN_IF_ERROR(check.OccupiedSlot(list.edits[i].slot));
    }
  }
  for (std::int64_t i = 0; i < list.num_edits; ++i) {
    const SlotEdit& edit = list.edits[i];
    if (!truncates(edit) || edit.length < 0) continue;
    const std::int64_t begin = edit.length / block_tokens;
    KVPAGE_RETURN_IF_ERROR(pool.supply->Separate(mapping, edit.slot, begin));
    table.EndTruncation(table.Lock(), edit.slot);
  }
  return {};
}

}  // namespace kvpage::sharing
