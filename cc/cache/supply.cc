#include "cache/supply.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>

namespace kvpage {
namespace {

constexpr std::int64_t kAllBlocks = std::numeric_limits<std::int64_t>::max();

std::string Number(std::int64_t value) { return std::to_string(value); }

std::int64_t CountBlocks(const std::vector<Donor>& donors) {
  std::int64_t sum = 0;
  for (const Donor& donor : donors) sum += donor.blocks;
  return sum;
}

}  // namespace

Status Supply::PromiseMappings(const MappingLock&, std::int64_t blocks) {
  const Geometry& geometry = table_->geometry();
  const std::int64_t ranges = geometry.max_slots * geometry.num_ranges();
  const std::int64_t worst = WorstMappings(blocks, ranges, geometry.max_blocks());
  if (mappings_.Change(worst + arena_->extra_mappings())) {
    worst_mappings_ = worst;
    return {};
  }
  const std::int64_t left = mappings_.Most();
  const std::int64_t most = MostBlocks(left, ranges);
  std::string advice = "close other pools";
  if (most >= geometry.num_ranges()) {
    const std::int64_t factor = (blocks + most - 1) / most;
    advice = "use block_tokens of at least " + Number(geometry.block_tokens * factor) +
             " (None chooses), a capacity of at most " + Number(most * geometry.block_bytes) +
             " bytes, close other pools";
  }
  return InvalidArgument(Number(blocks) + " blocks of " + Number(geometry.block_bytes) + " bytes may need " +
                         Number(worst) + " memory mappings, " + Number(left) + " are left: " +
                         mappings_.account()->Describe() + ": " + advice + ", or raise vm.max_map_count (sysctl)");
}

void Supply::Refresh(const MappingLock& lock) {
  FinishChanges(lock);
  std::vector<std::int32_t> changed = arena_->TakeChanged();
  {
    const StateLock state = table_->Lock();
    const std::vector<std::int32_t> rows = table_->TakeChanged(state);
    changed.insert(changed.end(), rows.begin(), rows.end());
  }
  SyncIndex(lock);
  EmptyBorrowers(lock, changed);
  // Mappings that forks have given up since, or that were promised but not used.
  if (mappings_.mappings() > worst_mappings_ + arena_->extra_mappings()) {
    static_cast<void>(PromiseAliases(lock, 0));
  }
  std::vector<Standing> standings;
  {
    const StateLock state = table_->Lock();
    standings.reserve(changed.size());
    for (const std::int32_t slot : changed) {
      const HostSlot& row = table_->host(state, slot);
      Standing now;
      now.idle = row.idle();
      now.draining = row.state == SlotState::kDraining;
      now.blocks = arena_->blocks(slot) - (now.draining ? arena_->hole(slot) : 0);
      // The slot parked for longest gives first; then occupied slots, whose tails may extend beyond what they
      // requested.
      const bool parked = row.state == SlotState::kFree;
      now.order = parked ? row.parked_at : ~std::uint64_t{0};
      const std::int64_t keep = parked ? 0 : table_->geometry().BlocksFor(row.reserved);
      if (!now.draining && row.views == 0) now.spare = std::max<std::int64_t>(now.blocks - keep, 0);
      now.fit = now.blocks;
      if (now.idle && (arena_->SharedBlocks(slot) > 0 || arena_->HasCached(slot) || arena_->hole(slot) > 0 ||
                       arena_->HasFile(slot))) {
        // Useless to a new owner and adopted last; among such slots the one parked for longest is adopted first.
        now.blocks = 0;
        now.fit = -1 - static_cast<std::int64_t>(row.parked_at);
      }
      standings.push_back(now);
    }
  }
  for (std::size_t i = 0; i < changed.size(); ++i) candidates_.Update(changed[i], standings[i]);
}

std::vector<std::int32_t> Supply::BestFits(const MappingLock& lock, const std::vector<std::int64_t>& blocks) {
  Refresh(lock);
  return candidates_.BestFits(blocks);
}

std::int64_t Supply::SpareBlocks(const std::vector<Want>& wants) const {
  std::int64_t spare = candidates_.spare();
  for (const Want& want : wants) {  // which name different slots
    const Standing slot = candidates_.standing(want.slot);
    spare -= std::max<std::int64_t>(slot.spare - std::max<std::int64_t>(slot.blocks - want.blocks, 0), 0);
  }
  return spare;
}

std::vector<Donor> Supply::FindDonors(const std::vector<Want>& wants, Spare spare, std::int64_t enough) const {
  std::vector<Donor> donors;
  if (enough <= 0) return donors;
  std::unordered_map<std::int32_t, std::int64_t> wanted;
  for (const Want& want : wants) wanted.emplace(want.slot, want.blocks);
  candidates_.ForEachDonor([&](Donor donor) {
    if (const auto want = wanted.find(donor.slot); want != wanted.end()) {
      donor.blocks = std::min(donor.blocks, candidates_.standing(donor.slot).blocks - want->second);
    }
    if (donor.blocks > 0) {
      donor.blocks = spare == Spare::kExclusive ? arena_->ExclusiveTail(donor.slot, donor.blocks)
                                                : std::min(donor.blocks, arena_->UncachedTail(donor.slot));
    }
    if (donor.blocks <= 0) return true;
    donors.push_back(donor);
    enough -= donor.blocks;
    return enough > 0;
  });
  return donors;
}

void Supply::Tally(const MappingLock& lock, const std::vector<Want>& wants, Claim* claim) {
  Refresh(lock);
  const std::int64_t ranges = table_->geometry().num_ranges();
  claim->free = arena_->pool().num_free();
  if (arena_->pool().num_shared() == 0 && arena_->pool().num_cached() == 0) {
    claim->reclaimable = SpareBlocks(wants) * ranges;
    claim->draining = candidates_.draining() * ranges + swaps_.CountWriting(*arena_);
    return;
  }
  std::int64_t evictable = 0;
  std::vector<std::int32_t> owners;
  PlanEviction(lock, kAllBlocks, &evictable, &owners);
  claim->reclaimable = CountBlocks(FindDonors(wants, Spare::kExclusive, kAllBlocks)) * ranges + evictable;
  std::vector<std::int32_t> draining;
  {
    const StateLock state = table_->Lock();
    draining.assign(table_->draining(state).begin(), table_->draining(state).end());
  }
  claim->draining = arena_->FreedBy(draining) + swaps_.CountWriting(*arena_);
}

Claim Supply::Plan(const MappingLock& lock, const std::vector<Want>& wants, Source first, SupplyPlan* plan,
                   bool evict) {
  const std::int64_t ranges = table_->geometry().num_ranges();
  Claim claim;
  *plan = {};
  plan->grants.reserve(wants.size());
  std::int64_t missing = 0;
  for (const Want& want : wants) {
    const std::int64_t before = arena_->blocks(want.slot);
    missing += std::max<std::int64_t>(want.blocks - before, 0);
    Grant grant;
    grant.slot = want.slot;
    grant.wanted = want.blocks;
    grant.before = before;
    plan->grants.push_back(grant);
  }
  claim.wanted = missing * ranges;
  std::int64_t free = arena_->pool().num_free();
  std::vector<Donor> donors;
  if (claim.wanted > free || first == Source::kDonors) {
    Refresh(lock);
    free = arena_->pool().num_free();  // free slots with shared blocks have given these up (EmptyBorrowers)
    // Do not search for donors if they clearly cannot suffice.
    if (claim.wanted <= free + SpareBlocks(wants) * ranges || arena_->pool().num_cached() > 0) {
      donors = FindDonors(wants, Spare::kExclusive, first == Source::kFree ? missing - free / ranges : missing);
    }
    const std::int64_t short_of = claim.wanted - free - CountBlocks(donors) * ranges;
    if (short_of > 0 && evict && Evict(lock, short_of) > 0) {
      // Now there are enough.
      Refresh(lock);
      free = arena_->pool().num_free();
      donors = FindDonors(wants, Spare::kExclusive, first == Source::kFree ? missing - free / ranges : missing);
    } else if (short_of > 0) {
      Tally(lock, wants, &claim);
      if (!evict && claim.wanted <= claim.free + claim.reclaimable) return claim;
      claim.status =
          ResourceExhausted(Number(claim.wanted) + " blocks wanted, " + Number(claim.free) + " free, " +
                                Number(claim.reclaimable) + " reclaimable, " + Number(claim.draining) + " draining",
                            Reason::kOutOfBlocks);
      return claim;
    }
  }
  PlanGrants(free / ranges, donors, first, plan);
  return claim;
}

SupplyPlan Supply::PlanReclaim(const MappingLock& lock, std::int64_t blocks) {
  Refresh(lock);
  const std::int64_t ranges = table_->geometry().num_ranges();
  const std::int64_t logical = (blocks + ranges - 1) / ranges;
  SupplyPlan plan;
  PlanReturns(logical, FindDonors({}, Spare::kExclusive, logical), &plan);
  return plan;
}

Status Supply::Reclaim(const MappingLock& lock, std::int64_t blocks) {
  SupplyPlan plan = PlanReclaim(lock, blocks);
  const std::int64_t short_of = blocks - CountBlocks(plan.returns) * table_->geometry().num_ranges();
  if (short_of > 0) plan = PlanReclaim(lock, blocks - Evict(lock, short_of));
  return Apply(lock, plan);
}

SupplyPlan Supply::PlanTrim(const MappingLock& lock) {
  Refresh(lock);
  SupplyPlan plan;
  plan.returns = FindDonors({}, Spare::kAll, kAllBlocks);
  return plan;
}

Status Supply::Apply(const MappingLock& lock, const SupplyPlan& plan, bool* system_short) {
  std::size_t returns = 0, moves = 0;  // completed
  const auto apply = [&]() -> Status {
    for (; returns < plan.returns.size(); ++returns) {
      const Donor& donor = plan.returns[returns];
      KVPAGE_RETURN_IF_ERROR(arena_->Shrink(donor.slot, arena_->blocks(donor.slot) - donor.blocks));
    }
    for (const Grant& grant : plan.grants) {
      for (; moves < grant.moves_end; ++moves) {
        const BlockMove& move = plan.moves[moves];
        KVPAGE_RETURN_IF_ERROR(arena_->Move(move.from, move.to, move.blocks));
      }
      if (arena_->HasFile(grant.slot)) {
        const std::int64_t more = grant.wanted - arena_->blocks(grant.slot);
        KVPAGE_RETURN_IF_ERROR(PromiseAliases(lock, Arena::kSplits * more * table_->geometry().num_ranges()));
      }
      if (Status status = arena_->Grow(grant.slot, grant.wanted); !status.ok()) {
        if (system_short != nullptr) *system_short = status.code() == Code::kResourceExhausted;
        return status;
      }
      KVPAGE_RETURN_IF_ERROR(Blank(lock, grant.slot, grant.before, arena_->blocks(grant.slot)));
    }
    return {};
  };
  Status status = apply();
  if (!status.ok()) UndoPart(lock, plan, returns, moves);
  return status;
}

void Supply::Undo(const MappingLock& lock, const SupplyPlan& plan) {
  UndoPart(lock, plan, plan.returns.size(), plan.moves.size());
}

void Supply::UndoPart(const MappingLock&, const SupplyPlan& plan, std::size_t returns, std::size_t moves) {
  // In reverse order. A step that fails leaves its blocks where they are; the last loop frees those of the wanting
  // slots.
  for (std::size_t i = plan.grants.size(); i-- > 0;) {
    const Grant& grant = plan.grants[i];
    const std::size_t begin = i > 0 ? plan.grants[i - 1].moves_end : 0;
    const std::size_t end = std::min(grant.moves_end, moves);
    std::int64_t moved = 0;
    for (std::size_t m = begin; m < end; ++m) moved += plan.moves[m].blocks;
    if (!arena_->Shrink(grant.slot, grant.before + moved).ok()) continue;  // claimed blocks follow the moved ones
    for (std::size_t m = end; m-- > begin;) {
      const BlockMove& move = plan.moves[m];
      if (!arena_->Move(move.to, move.from, move.blocks).ok()) break;
    }
  }
  for (const Grant& grant : plan.grants) static_cast<void>(arena_->Shrink(grant.slot, grant.before));
  while (returns-- > 0) {
    const Donor& donor = plan.returns[returns];
    static_cast<void>(arena_->Grow(donor.slot, arena_->blocks(donor.slot) + donor.blocks));
  }
}

Claim Supply::Reserve(const MappingLock& lock, const std::vector<Want>& wants, SupplyPlan* plan) {
  Claim claim = Plan(lock, wants, Source::kFree, plan, /*evict=*/true);
  if (!claim.status.ok()) return claim;
  const std::int64_t free = arena_->pool().num_free();
  bool system_short = false;
  claim.status = Apply(lock, *plan, &system_short);
  if (system_short) {
    // On a GPU, JAX may hold the rest of the memory. Blocks that are mapped but not needed have theirs already.
    SupplyPlan moving;
    if (Plan(lock, wants, Source::kDonors, &moving, /*evict=*/true).status.ok() &&
        moving.blocks_moved() > plan->blocks_moved()) {
      claim.status = Apply(lock, moving);
      *plan = std::move(moving);
    }
  }
  if (!claim.status.ok()) Tally(lock, wants, &claim);
  const auto least = static_cast<std::int64_t>(free_share_ * static_cast<double>(arena_->pool().budget()));
  if (on_pressure_ && free >= least && arena_->pool().num_free() < least) on_pressure_();
  return claim;
}

Status Supply::Blank(const MappingLock&, std::int32_t slot, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return {};
  const bool viewed = table_->viewed(table_->Lock(), slot);
  if (viewed) return arena_->Fill(slot, begin, end, 0);
  if (poison_) return arena_->Fill(slot, begin, end, 0xFF);  // a NaN in every storage type
  return {};
}

}  // namespace kvpage
