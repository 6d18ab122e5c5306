#include "cache/supply.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvpage {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

}  // namespace

Status Supply::PromiseMappings(const MappingLock&, std::int64_t blocks) {
  const Geometry& geometry = table_->geometry();
  const std::int64_t ranges = geometry.max_slots * geometry.num_ranges();
  const std::int64_t worst = WorstMappings(blocks, ranges, geometry.max_blocks());
  if (mappings_.Change(worst)) return {};
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

std::int32_t Supply::BestFit(const MappingLock&, std::int64_t blocks, const std::vector<bool>& taken) {
  // The smallest that suffices; failing that the largest. A request for nothing will grow: it prefers a warm slot too.
  blocks = std::max<std::int64_t>(blocks, 1);
  std::int32_t best = -1;
  const StateLock state = table_->Lock();
  for (std::int32_t slot = 0; slot < table_->num_slots(); ++slot) {
    if (taken[slot] || !table_->host(state, slot).idle()) continue;
    if (best < 0) {
      best = slot;
      continue;
    }
    const std::int64_t have = arena_->blocks(slot);
    const std::int64_t held = arena_->blocks(best);
    const bool better = held >= blocks ? have >= blocks && have < held : have > held;
    if (better) best = slot;
  }
  return best;
}

std::vector<Donor> Supply::FindDonors(const MappingLock&, const std::vector<Want>& wants, Spare spare,
                                      std::int64_t* draining) {
  const std::int64_t num_slots = table_->num_slots();
  std::vector<std::int64_t> keep(num_slots, 0);
  for (const Want& want : wants) keep[want.slot] = std::max(keep[want.slot], want.blocks);
  std::vector<std::int8_t> drains(num_slots, 0);
  // The one parked for longest gives first; then occupied ones, whose tails may go beyond their request.
  std::vector<std::pair<std::uint64_t, Donor>> order;
  {
    const StateLock state = table_->Lock();
    for (std::int32_t slot = 0; slot < num_slots; ++slot) {
      const HostSlot& row = table_->host(state, slot);
      drains[slot] = row.state == SlotState::kDraining;
      if (row.state == SlotState::kDraining || row.views > 0) continue;
      const bool parked = row.state == SlotState::kFree;
      if (!parked) keep[slot] = std::max(keep[slot], table_->geometry().BlocksFor(row.reserved));
      const std::int64_t rest = arena_->blocks(slot) - keep[slot];
      if (rest > 0) order.push_back({parked ? row.parked_at : ~std::uint64_t{0}, {slot, rest}});
    }
  }
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Donor> donors;
  for (const auto& [unused, donor] : order) {
    const std::int64_t blocks = spare == Spare::kAll ? donor.blocks : arena_->ExclusiveTail(donor.slot, donor.blocks);
    if (blocks > 0) donors.push_back({donor.slot, blocks});
  }
  if (draining != nullptr) *draining = arena_->FreedBy(drains);
  return donors;
}

std::vector<Donor> Supply::TallyDonors(const MappingLock& lock, const std::vector<Want>& wants, Claim* claim) {
  std::vector<Donor> donors = FindDonors(lock, wants, Spare::kExclusive, &claim->draining);
  claim->free = arena_->pool().num_free();
  claim->reclaimable = 0;
  for (const Donor& donor : donors) claim->reclaimable += donor.blocks * table_->geometry().num_ranges();
  return donors;
}

void Supply::Tally(const MappingLock& lock, const std::vector<Want>& wants, Claim* claim) {
  static_cast<void>(TallyDonors(lock, wants, claim));
}

Claim Supply::Plan(const MappingLock& lock, const std::vector<Want>& wants, Source first, SupplyPlan* plan) {
  const std::int64_t ranges = table_->geometry().num_ranges();
  Claim claim;
  *plan = {};
  plan->grants.reserve(wants.size());
  for (const Want& want : wants) {
    const std::int64_t before = arena_->blocks(want.slot);
    claim.wanted += std::max<std::int64_t>(want.blocks - before, 0) * ranges;
    Grant grant;
    grant.slot = want.slot;
    grant.wanted = want.blocks;
    grant.before = before;
    plan->grants.push_back(grant);
  }
  const std::int64_t free = arena_->pool().num_free();
  std::vector<Donor> donors;
  if (claim.wanted > free || first == Source::kDonors) {
    donors = TallyDonors(lock, wants, &claim);
    if (claim.wanted > claim.free + claim.reclaimable) {
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
  const std::int64_t ranges = table_->geometry().num_ranges();
  SupplyPlan plan;
  PlanReturns((blocks + ranges - 1) / ranges, FindDonors(lock, {}, Spare::kExclusive, nullptr), &plan);
  return plan;
}

SupplyPlan Supply::PlanTrim(const MappingLock& lock) {
  SupplyPlan plan;
  plan.returns = FindDonors(lock, {}, Spare::kAll, nullptr);
  return plan;
}

Status Supply::Apply(const MappingLock& lock, const SupplyPlan& plan, bool* system_short) {
  std::size_t returns = 0, moves = 0;  // done
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
  // Backwards. A step that fails leaves its blocks where they are; the last loop frees those of the wanting slots.
  for (std::size_t i = plan.grants.size(); i-- > 0;) {
    const Grant& grant = plan.grants[i];
    const std::size_t begin = i > 0 ? plan.grants[i - 1].moves_end : 0;
    const std::size_t end = std::min(grant.moves_end, moves);
    std::int64_t moved = 0;
    for (std::size_t m = begin; m < end; ++m) moved += plan.moves[m].blocks;
    if (!arena_->Shrink(grant.slot, grant.before + moved).ok()) continue;  // claimed blocks lie behind moved ones
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
  Claim claim = Plan(lock, wants, Source::kFree, plan);
  if (!claim.status.ok()) return claim;
  bool system_short = false;
  claim.status = Apply(lock, *plan, &system_short);
  if (system_short) {
    // On a GPU, JAX may hold the rest of the memory. Blocks that are mapped and not needed have theirs already.
    SupplyPlan moving;
    if (Plan(lock, wants, Source::kDonors, &moving).status.ok() && moving.blocks_moved() > plan->blocks_moved()) {
      claim.status = Apply(lock, moving);
      *plan = std::move(moving);
    }
  }
  if (!claim.status.ok()) Tally(lock, wants, &claim);
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
