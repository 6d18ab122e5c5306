// Which slot is adopted, and which donors give blocks in which order: the ordered candidates against a plain walk over
// all slots, for random operations with shared blocks, views and draining slots.
#include "cache/candidates.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cache/supply.h"
#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kManySlots = 24;
constexpr std::int64_t kMaxBlocks = 8, kBlocks = 72;  // logical

// A model that walks over all slots: the supply must find what it finds.
class Walk {
 public:
  Walk(const SlotTable& table, const StateLock& state, const Arena& arena)
      : table_(table), state_(state), arena_(arena) {}

  std::vector<std::int32_t> BestFits(const std::vector<std::int64_t>& requests) const {
    std::vector<std::int32_t> slots;
    std::vector<bool> taken(kManySlots, false);
    for (const std::int64_t request : requests) {
      const std::int64_t blocks = std::max<std::int64_t>(request, 1);
      std::int32_t best = -1;
      for (std::int32_t slot = 0; slot < kManySlots; ++slot) {
        if (taken[slot] || !table_.host(state_, slot).idle()) continue;
        const std::int64_t have = Usable(slot), held = best < 0 ? -1 : Usable(best);
        if (best < 0 || (held >= blocks ? have >= blocks && have < held : have > held)) best = slot;
      }
      if (best < 0) break;
      taken[best] = true;
      slots.push_back(best);
    }
    return slots;
  }

  std::vector<Donor> Donors(const std::vector<Want>& wants, bool exclusive) const {
    std::vector<std::int64_t> keep(kManySlots, 0);
    for (const Want& want : wants) keep[want.slot] = want.blocks;
    std::vector<std::pair<std::uint64_t, Donor>> order;
    for (std::int32_t slot = 0; slot < kManySlots; ++slot) {
      const HostSlot& row = table_.host(state_, slot);
      if (row.state == SlotState::kDraining || row.views > 0) continue;
      const bool parked = row.state == SlotState::kFree;
      if (!parked) keep[slot] = std::max(keep[slot], table_.geometry().BlocksFor(row.reserved));
      const std::int64_t rest = arena_.blocks(slot) - keep[slot];
      if (rest > 0) order.push_back({parked ? row.parked_at : ~std::uint64_t{0}, {slot, rest}});
    }
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<Donor> donors;
    for (const auto& [unused, donor] : order) {
      const std::int64_t blocks = exclusive ? arena_.ExclusiveTail(donor.slot, donor.blocks) : donor.blocks;
      if (blocks > 0) donors.push_back({donor.slot, blocks});
    }
    return donors;
  }

  // Returns the blocks that become free when all draining slots have drained.
  std::int64_t Draining() const {
    std::vector<std::int32_t> dropped(arena_.pool().num_blocks(), 0);
    std::int64_t freed = 0;
    for (std::int32_t slot = 0; slot < kManySlots; ++slot) {
      if (table_.host(state_, slot).state != SlotState::kDraining) continue;
      for (std::int64_t range = 0; range < table_.geometry().num_ranges(); ++range) {
        for (const std::int32_t block : arena_.block_map(slot, range)) {
          freed += ++dropped[block] == arena_.pool().references(block);
        }
      }
    }
    return freed;
  }

 private:
  // Returns the blocks that a new owner of a free slot can use. Slots that must first give up their blocks come last,
  // the one parked for longest first among them.
  std::int64_t Usable(std::int32_t slot) const {
    if (arena_.SharedBlocks(slot) == 0) return arena_.blocks(slot);
    return -1 - static_cast<std::int64_t>(table_.host(state_, slot).parked_at);
  }

  const SlotTable& table_;
  const StateLock& state_;
  const Arena& arena_;
};

std::vector<std::vector<std::int64_t>> Numbers(const SupplyPlan& plan) {
  std::vector<std::vector<std::int64_t>> rows;
  for (const Grant& g : plan.grants) {
    rows.push_back({g.slot, g.wanted, g.before, g.claimed, static_cast<std::int64_t>(g.moves_end)});
  }
  for (const BlockMove& move : plan.moves) rows.push_back({move.from, move.to, move.blocks});
  for (const Donor& donor : plan.returns) rows.push_back({donor.slot, donor.blocks});
  return rows;
}

class Machine {
 public:
  Machine(std::uint32_t seed, Layout layout, bool shares)
      : random_(seed), shares_(shares), geometry_(ManySlots(layout)), table_(geometry_) {
    std::unique_ptr<Arena> arena;
    EXPECT_OK(Arena::Make(geometry_, kBlocks * geometry_.num_ranges(), MakeVmm(geometry_), &arena));
    supply_ = std::make_unique<Supply>(&table_, std::move(arena), nullptr, false);
  }

  void Step() {
    const MappingLock mapping = supply_->Lock();
    static_cast<void>(supply_->BestFits(mapping, {}));  // makes free slots give up shared blocks
    Compare(mapping);
    Change(mapping);
  }
  int plans() const { return plans_; }
  int refusals() const { return refusals_; }
  int moves() const { return moves_; }

 private:
  static Geometry ManySlots(Layout layout) {
    Geometry geometry = SmallGeometry(layout);
    geometry.max_slots = kManySlots;
    return geometry;
  }
  std::int64_t Pick(std::int64_t below) { return static_cast<std::int64_t>(random_() % below); }
  SlotState StateOf(std::int32_t slot) { return table_.host(table_.Lock(), slot).state; }

  // Returns some slots that a claim could name, each once.
  std::vector<Want> SomeWants() {
    std::vector<Want> wants;
    for (std::int32_t slot = 0; slot < kManySlots; ++slot) {
      if (StateOf(slot) != SlotState::kDraining && Pick(16) == 0) wants.push_back({slot, Pick(kMaxBlocks + 1)});
    }
    std::shuffle(wants.begin(), wants.end(), random_);
    return wants;
  }

  void Compare(const MappingLock& mapping) {
    const std::vector<Want> wants = SomeWants();
    std::vector<std::int64_t> requests(Pick(6) == 0 ? kManySlots : Pick(5));
    for (std::int64_t& blocks : requests) blocks = Pick(kMaxBlocks + 1);
    const std::int64_t ranges = geometry_.num_ranges(), free = supply_->arena(mapping).pool().num_free();
    const std::int64_t reclaim = Pick(3 * kMaxBlocks * ranges);

    std::vector<std::int32_t> slots;
    std::vector<Donor> donors, spare, trimmed;
    std::int64_t draining = 0;
    {
      const StateLock state = table_.Lock();
      const Walk walk(table_, state, supply_->arena(mapping));
      slots = walk.BestFits(requests);
      donors = walk.Donors(wants, /*exclusive=*/true);
      spare = walk.Donors({}, /*exclusive=*/true);
      trimmed = walk.Donors({}, /*exclusive=*/false);
      draining = walk.Draining();
    }
    EXPECT_EQ(supply_->BestFits(mapping, requests), slots);
    EXPECT_EQ(supply_->BestFits(mapping, requests), slots) << "asking changes nothing";

    std::int64_t reclaimable = 0;
    for (const Donor& donor : donors) reclaimable += donor.blocks * ranges;
    Claim claim;
    supply_->Tally(mapping, wants, &claim);
    EXPECT_EQ(claim.free, free);
    EXPECT_EQ(claim.reclaimable, reclaimable);
    EXPECT_EQ(claim.draining, draining);

    SupplyPlan want_plan, plan;
    PlanReturns((reclaim + ranges - 1) / ranges, spare, &want_plan);
    EXPECT_EQ(Numbers(supply_->PlanReclaim(mapping, reclaim)), Numbers(want_plan));
    want_plan = {};
    want_plan.returns = trimmed;
    EXPECT_EQ(Numbers(supply_->PlanTrim(mapping)), Numbers(want_plan));

    for (const Source first : {Source::kFree, Source::kDonors}) {
      want_plan = {};
      std::int64_t wanted = 0;
      for (const Want& want : wants) {
        Grant grant;
        grant.slot = want.slot;
        grant.wanted = want.blocks;
        grant.before = supply_->arena(mapping).blocks(want.slot);
        wanted += std::max<std::int64_t>(grant.wanted - grant.before, 0) * ranges;
        want_plan.grants.push_back(grant);
      }
      claim = supply_->Plan(mapping, wants, first, &plan);
      EXPECT_EQ(claim.wanted, wanted);
      EXPECT_EQ(claim.status.ok(), wanted <= free + reclaimable);
      ++(claim.status.ok() ? plans_ : refusals_);
      if (!claim.status.ok()) {
        EXPECT_EQ(claim.reclaimable, reclaimable);
        EXPECT_EQ(claim.draining, draining);
        continue;
      }
      const bool pressed = first == Source::kDonors || wanted > free;
      PlanGrants(free / ranges, pressed ? donors : std::vector<Donor>{}, first, &want_plan);
      EXPECT_EQ(Numbers(plan), Numbers(want_plan));
      moves_ += static_cast<int>(plan.moves.size());
    }
  }

  void Change(const MappingLock& mapping) {
    const auto slot = static_cast<std::int32_t>(Pick(kManySlots));
    const SlotState before = StateOf(slot);
    Arena& arena = supply_->arena(mapping);
    switch (Pick(10)) {
      case 0:
      case 1:
      case 2:
        return Acquire(mapping);
      case 3: {  // extend, map_slots
        if (before != SlotState::kOccupied) return;
        const std::int64_t tokens = Pick(geometry_.max_seq_len + 1);
        SupplyPlan plan;
        const Claim claim = supply_->Reserve(mapping, {{slot, geometry_.BlocksFor(tokens)}}, &plan);
        if (claim.status.ok() && Pick(4) > 0) table_.Reserve(table_.Lock(), slot, tokens);
        return;
      }
      case 4:
        if (before == SlotState::kOccupied) table_.StartDraining(table_.Lock(), slot);
        return;
      case 5: {
        const StateLock state = table_.Lock();
        if (table_.draining(state).empty()) return;
        const std::int32_t first = *table_.draining(state).begin();
        if (Pick(4) > 0) {
          table_.Vacate(state, first);
        } else if (!table_.progress(state).slots[first].vacated) {
          table_.CancelDraining(state, first);
        }
        return;
      }
      case 6:
        if (before == SlotState::kOccupied && views_.size() < 2) {
          table_.AddView(table_.Lock(), slot);
          views_.push_back(slot);
        }
        return;
      case 7:
        if (views_.empty()) return;
        table_.RemoveView(table_.Lock(), views_.back());
        views_.pop_back();
        return;
      case 8: {
        if (!shares_ || before != SlotState::kOccupied || Pick(2) == 0) return;
        for (const std::int32_t fork : supply_->FewestBlocks(mapping, 1)) {
          const std::int64_t blocks = arena.blocks(slot);
          EXPECT_OK(arena.Shrink(fork, 0));
          table_.OccupyFork(table_.Lock(), fork, slot, 0);
          EXPECT_OK(supply_->Alias(mapping, {{fork, supply_->arena(mapping).map(slot), blocks}}));
          if (Pick(4) > 0) table_.Reserve(table_.Lock(), fork, blocks * geometry_.block_tokens);
        }
        return;
      }
      default:
        if (Pick(8) > 0) return;
        EXPECT_OK(
            supply_->Apply(mapping, Pick(2) == 0 ? supply_->PlanTrim(mapping) : supply_->PlanReclaim(mapping, 9)));
        return;
    }
  }

  void Acquire(const MappingLock& mapping) {
    std::vector<std::int64_t> blocks(1 + Pick(3));
    for (std::int64_t& b : blocks) b = Pick(kMaxBlocks + 1);
    const std::vector<std::int32_t> slots = supply_->BestFits(mapping, blocks);
    std::vector<Want> wants;
    for (std::size_t i = 0; i < slots.size(); ++i) wants.push_back({slots[i], blocks[i]});
    SupplyPlan plan;
    if (!supply_->Reserve(mapping, wants, &plan).status.ok()) return;
    if (Pick(6) == 0) return supply_->Undo(mapping, plan);
    const StateLock state = table_.Lock();
    for (const Want& want : wants) table_.Occupy(state, want.slot, want.blocks * geometry_.block_tokens);
  }

  std::mt19937 random_;
  const bool shares_;
  const Geometry geometry_;
  SlotTable table_;
  std::unique_ptr<Supply> supply_;
  std::vector<std::int32_t> views_;
  int plans_ = 0, refusals_ = 0, moves_ = 0;
};

TEST(CandidatesTest, ChooseAsAWalkOverAllSlotsDoes) {
  for (const bool shares : {false, true}) {
    for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
      int plans = 0, refusals = 0, moves = 0;
      for (std::uint32_t seed = 0; seed < 12 && !HasFailure(); ++seed) {
        Machine machine(seed, layout, shares);
        for (int step = 0; step < 300 && !HasFailure(); ++step) machine.Step();
        EXPECT_FALSE(HasFailure()) << "seed " << seed << ", shares " << shares;
        plans += machine.plans();
        refusals += machine.refusals();
        moves += machine.moves();
      }
      EXPECT_TRUE(plans > 500 && refusals > 100 && moves > 500) << plans << " " << refusals << " " << moves;
    }
  }
}

TEST(CandidatesTest, ASlotIsChosenOnceAndStaysIdle) {
  Candidates candidates(3);
  Standing two;
  two.blocks = two.fit = 2;
  candidates.Update(1, two);
  EXPECT_EQ(candidates.BestFits({0, 9, 1, 1}), (std::vector<std::int32_t>{1, 0, 2})) << "three are all there are";
  EXPECT_EQ(candidates.BestFits({2}), (std::vector<std::int32_t>{1}));
}

}  // namespace
}  // namespace kvpage::testing
