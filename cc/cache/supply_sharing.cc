// The part of Supply for sequences that share blocks: see sharing.h.
#include <string>

#include "cache/supply.h"

namespace kvpage {

std::vector<std::int32_t> Supply::FewestBlocks(const MappingLock& lock, std::size_t count) {
  Refresh(lock);
  return candidates_.FewestBlocks(count);
}

Status Supply::PromiseAliases(const MappingLock&, std::int64_t more) {
  // Uses a recent reading of the process's mappings: a new one costs more than most aliases.
  const std::int64_t wanted = worst_mappings_ + arena_->extra_mappings() + more;
  if (mappings_.Change(wanted, MapAccount::Reading::kRecent)) return {};
  return FailedPrecondition("mapping blocks in another slot may take " + std::to_string(more) +
                            " more memory mappings, " +
                            std::to_string(mappings_.Most() - worst_mappings_ - arena_->extra_mappings()) +
                            " are left: " + mappings_.account()->Describe() +
                            ": release forks, use larger block_tokens, or raise vm.max_map_count (sysctl)");
}

Status Supply::Alias(const MappingLock& lock, const std::vector<AliasRun>& runs) {
  std::int64_t mappings = 0;
  for (const AliasRun& run : runs) mappings += arena_->AliasMappings(run.map, run.blocks);
  if (mappings == 0) return {};
  KVPAGE_RETURN_IF_ERROR(PromiseAliases(lock, mappings));
  for (const AliasRun& run : runs) KVPAGE_RETURN_IF_ERROR(arena_->Alias(run.slot, run.map, run.blocks));
  return {};
}

Claim Supply::SetAside(const MappingLock& lock, const std::vector<SetAsideBlocks>& wanted) {
  const std::int64_t ranges = table_->geometry().num_ranges();
  Claim claim;
  for (const SetAsideBlocks& slot : wanted) claim.wanted += static_cast<std::int64_t>(slot.logical.size()) * ranges;
  if (claim.wanted == 0) return claim;
  Refresh(lock);
  if (const std::int64_t short_of = claim.wanted - arena_->pool().num_free(); short_of > 0) {
    Tally(lock, {}, &claim);
    if (short_of > claim.reclaimable) {
      claim.status = ResourceExhausted(std::to_string(claim.wanted) + " blocks wanted, " + std::to_string(claim.free) +
                                           " free, " + std::to_string(claim.reclaimable) + " reclaimable, " +
                                           std::to_string(claim.draining) + " draining",
                                       Reason::kOutOfBlocks);
      return claim;
    }
  }
  claim.status = PromiseAliases(lock, Arena::kSplits * claim.wanted);
  if (!claim.status.ok()) return claim;
  if (const std::int64_t short_of = claim.wanted - arena_->pool().num_free(); short_of > 0) {
    claim.status = Reclaim(lock, short_of);
  }
  std::size_t done = 0;
  for (; claim.status.ok() && done < wanted.size(); ++done) {
    claim.status = arena_->SetAside(wanted[done].slot, wanted[done].logical);
  }
  if (claim.status.ok()) return claim;
  while (done-- > 0) arena_->DropSetAside(wanted[done].slot, wanted[done].logical);
  if (claim.status.code() == Code::kResourceExhausted) Tally(lock, {}, &claim);
  return claim;
}

void Supply::DropStaleSetAside(const MappingLock&) {
  for (std::int32_t slot = 0; arena_->num_set_aside() > 0 && slot < table_->num_slots(); ++slot) {
    const bool queued = table_->host(table_->Lock(), slot).truncations > 0;
    if (!queued) arena_->DropSetAsideFrom(slot, 0);
  }
}

Status Supply::DropShared(const MappingLock& lock, std::int32_t slot) {
  if (GivesUp(lock, slot)) return Empty(lock, slot);
  if (index_ != nullptr && index_->Tokens(slot) > 0) index_->Detach(slot);  // stored in another slot's blocks
  // A release may have ended since the index was last updated; the slot gets a new occupant, who may write.
  table_->ForgetSequence(table_->Lock(), slot);
  return {};
}

void Supply::EmptyBorrowers(const MappingLock& lock, const std::vector<std::int32_t>& changed) {
  bool emptied = false;
  for (const std::int32_t slot : changed) {
    const bool hole = arena_->hole(slot) > 0;
    const std::int64_t read_only = arena_->ReadOnlyBlocks(slot), end = arena_->blocks(slot);
    // What the slot has written itself may be found again. But a sequence that was swapped in may map an entry without
    // an owner, which nobody could evict while it stays mapped.
    bool owns = false, cached = index_ != nullptr && arena_->HasCached(slot, read_only);
    for (std::int64_t logical = read_only; cached && !owns && logical < end; ++logical) {
      owns = index_->Owns(slot, logical);
    }
    const bool elsewhere = arena_->Borrows(slot) || hole || arena_->HasFile(slot);
    if (!(elsewhere || cached != owns) || !table_->host(table_->Lock(), slot).idle()) continue;
    if (!hole && cached && owns) continue;
    static_cast<void>(Empty(lock, slot));  // a slot that cannot be emptied is not adopted either (DropShared)
    emptied = true;
  }
  if (emptied) static_cast<void>(arena_->TakeChanged());  // these slots are already among the changed ones
}

Status Supply::DropFreeShared(const MappingLock& lock) {
  if (arena_->pool().num_shared() == 0) return {};
  for (std::int32_t slot = 0; slot < table_->num_slots(); ++slot) {
    if (arena_->SharedBlocks(slot) == 0 || !table_->host(table_->Lock(), slot).idle()) continue;
    KVPAGE_RETURN_IF_ERROR(Empty(lock, slot));
  }
  return {};
}

Status Supply::DropFreeCached(const MappingLock& lock) {
  const BlockPool& blocks = arena_->pool();
  if (blocks.num_shared() == 0 && blocks.num_cached() == 0 && blocks.num_sealed() == 0) return {};
  SyncIndex(lock);
  for (std::int32_t slot = 0; slot < table_->num_slots(); ++slot) {
    const bool idle = table_->host(table_->Lock(), slot).idle();
    if (idle) KVPAGE_RETURN_IF_ERROR(DropShared(lock, slot));
  }
  return {};
}

Status Supply::Separate(const MappingLock& lock, std::int32_t slot, std::int64_t begin) {
  const Status status = arena_->Separate(slot, begin, /*hold=*/true);
  ReleaseHeld(lock);
  return status;
}

}  // namespace kvpage
