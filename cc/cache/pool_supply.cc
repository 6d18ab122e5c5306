// Where blocks come from: free ones, those of parked slots, tails beyond what an occupied slot asked for.
#include <algorithm>
#include <string>
#include <utility>

#include "cache/pool.h"

namespace kvpage {

// What each slot must keep when others are pressed for blocks.
std::int64_t Pool::Floor(std::int64_t slot, const std::vector<Want>& wants) {
  std::int64_t floor = 0;
  for (const Want& want : wants) {
    if (want.slot == slot) floor = std::max(floor, std::min(want.blocks, arena_->blocks(slot)));
  }
  const std::lock_guard<std::mutex> state(state_mutex_);
  const Slot& row = slots_[slot];
  if (row.state == SlotState::kDraining || row.views > 0) return arena_->blocks(slot);
  if (row.state == SlotState::kOccupied) floor = std::max(floor, geometry_.BlocksFor(row.reserved));
  return std::min(floor, arena_->blocks(slot));
}

void Pool::Tally(const std::vector<Want>& wants, Claim* claim) {
  claim->free = arena_->pool().num_free();
  claim->reclaimable = claim->draining = 0;
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    claim->reclaimable += (arena_->blocks(slot) - Floor(slot, wants)) * geometry_.num_ranges();
    const std::lock_guard<std::mutex> state(state_mutex_);
    if (slots_[slot].state == SlotState::kDraining) claim->draining += arena_->physical_blocks(slot);
  }
}

// Slots that may have blocks to give: parked ones, the one parked for longest first; then occupied ones, whose tails
// may go beyond their request.
std::vector<std::int32_t> Pool::Donors() {
  std::vector<std::pair<std::uint64_t, std::int32_t>> order;
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    for (std::int32_t slot = 0; slot < geometry_.max_slots; ++slot) {
      if (arena_->blocks(slot) == 0) continue;
      const bool parked = slots_[slot].state == SlotState::kFree;
      order.emplace_back(parked ? slots_[slot].parked_at : ~std::uint64_t{0}, slot);
    }
  }
  std::sort(order.begin(), order.end());
  std::vector<std::int32_t> donors;
  for (const auto& [unused, slot] : order) donors.push_back(slot);
  return donors;
}

// Frees at least so many physical blocks, as far as nobody needs them.
Status Pool::Steal(std::int64_t blocks) {
  const std::int64_t ranges = geometry_.num_ranges();
  for (const std::int32_t slot : Donors()) {
    if (blocks <= 0) break;
    const std::int64_t spare = arena_->blocks(slot) - Floor(slot, {});
    const std::int64_t take = std::min(spare, (blocks + ranges - 1) / ranges);
    KVPAGE_RETURN_IF_ERROR(arena_->Shrink(slot, arena_->blocks(slot) - take));
    blocks -= take * ranges;
  }
  return {};
}

// Gives one slot what it wants: free blocks, and once these are gone mapped ones of the donors, which are moved as they
// are. Donors that have nothing left are dropped from the end of the list.
Status Pool::Supply(const Want& want, const std::vector<Want>& wants, std::vector<std::int32_t>* donors) {
  std::int64_t missing = want.blocks - arena_->blocks(want.slot);
  const std::int64_t free = std::min(missing, arena_->pool().num_free() / geometry_.num_ranges());
  while (missing > free && !donors->empty()) {
    const std::int32_t donor = donors->back();
    const std::int64_t take = std::min(missing - free, arena_->blocks(donor) - Floor(donor, wants));
    KVPAGE_RETURN_IF_ERROR(arena_->Move(donor, want.slot, take));
    missing -= take;
    if (missing > free) donors->pop_back();
  }
  Status status = arena_->Grow(want.slot, want.blocks);
  if (status.code() != Code::kResourceExhausted) return status;
  // The system has less than the capacity promises (on a GPU, JAX may hold the rest): what is mapped elsewhere and not
  // needed there is memory that it has.
  const std::int64_t had = arena_->blocks(want.slot);
  for (const std::int32_t donor : Donors()) {
    const std::int64_t spare = arena_->blocks(donor) - Floor(donor, wants);
    KVPAGE_RETURN_IF_ERROR(arena_->Move(donor, want.slot, std::min(want.blocks - arena_->blocks(want.slot), spare)));
  }
  return arena_->blocks(want.slot) > had ? arena_->Grow(want.slot, want.blocks) : status;
}

Status Pool::Blank(std::int64_t slot, std::int64_t begin, std::int64_t end) {
  bool viewed;
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    viewed = arena_views_ > 0 || slots_[slot].views > 0;
  }
  if (viewed) return arena_->Fill(slot, begin, end, 0);
  if (options_.poison) return arena_->Fill(slot, begin, end, 0xFF);  // a NaN in every storage type
  return {};
}

std::vector<std::int64_t> Pool::Held(const std::vector<Want>& wants) const {
  std::vector<std::int64_t> held;
  for (const Want& want : wants) held.push_back(arena_->blocks(want.slot));
  return held;
}

Claim Pool::Reserve(const std::vector<Want>& wants) {
  Claim claim;
  for (const Want& want : wants) {
    claim.wanted += std::max<std::int64_t>(want.blocks - arena_->blocks(want.slot), 0) * geometry_.num_ranges();
  }
  std::vector<std::int32_t> donors;  // the first to give stands last
  if (claim.wanted > arena_->pool().num_free()) {
    Tally(wants, &claim);
    if (claim.wanted > claim.free + claim.reclaimable) {
      claim.status = ResourceExhausted(std::to_string(claim.wanted) + " blocks wanted, " + std::to_string(claim.free) +
                                           " free, " + std::to_string(claim.reclaimable) + " reclaimable, " +
                                           std::to_string(claim.draining) + " draining",
                                       Reason::kOutOfBlocks);
      return claim;
    }
    donors = Donors();
    std::reverse(donors.begin(), donors.end());
  }
  const std::vector<std::int64_t> before = Held(wants);
  for (const Want& want : wants) {
    claim.status = Supply(want, wants, &donors);
    if (claim.status.ok()) claim.status = Blank(want.slot, before[&want - wants.data()], arena_->blocks(want.slot));
    if (claim.status.ok()) continue;
    for (std::size_t i = 0; i < before.size(); ++i) static_cast<void>(arena_->Shrink(wants[i].slot, before[i]));
    Tally(wants, &claim);
    return claim;
  }
  return claim;
}

std::int32_t Pool::BestFit(std::int64_t blocks, const std::vector<bool>& taken) {
  // The smallest that suffices; failing that the largest. A request for nothing will grow: it prefers a warm slot too.
  blocks = std::max<std::int64_t>(blocks, 1);
  std::int32_t best = -1;
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (std::int32_t slot = 0; slot < geometry_.max_slots; ++slot) {
    if (taken[slot] || !slots_[slot].idle()) continue;
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

}  // namespace kvpage
