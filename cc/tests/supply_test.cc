// Supply: plans as data, applied and undone; donors that share blocks.
#include "cache/supply.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

SupplyPlan Wanting(const std::vector<Grant>& grants) {
  SupplyPlan plan;
  plan.grants = grants;
  return plan;
}

Grant MakeGrant(std::int32_t slot, std::int64_t wanted, std::int64_t before) {
  Grant grant;
  grant.slot = slot;
  grant.wanted = wanted;
  grant.before = before;
  return grant;
}

TEST(SupplyTest, FreeBlocksGoFirstAndDonorsGiveInOrder) {
  SupplyPlan plan = Wanting({MakeGrant(0, 5, 1), MakeGrant(1, 2, 0), MakeGrant(2, 1, 3)});
  PlanGrants(/*free=*/3, {{3, 2}, {4, 4}}, Source::kFree, &plan);
  EXPECT_EQ(plan.moves.size(), std::size_t{3});
  EXPECT_TRUE(plan.moves[0].from == 3 && plan.moves[0].to == 0 && plan.moves[0].blocks == 1);
  EXPECT_TRUE(plan.moves[1].from == 3 && plan.moves[1].to == 1 && plan.moves[1].blocks == 1);
  EXPECT_TRUE(plan.moves[2].from == 4 && plan.moves[2].to == 1 && plan.moves[2].blocks == 1);
  EXPECT_EQ(plan.grants[0].claimed, 3);
  EXPECT_EQ(plan.grants[1].claimed, 0);
  EXPECT_EQ(plan.grants[2].claimed, 0) << "it has more than it wants";
  EXPECT_EQ(plan.grants[0].moves_end, std::size_t{1});
  EXPECT_EQ(plan.grants[2].moves_end, std::size_t{3});
}

TEST(SupplyTest, DonorsGoFirstWhereTheSystemHasNoMemory) {
  SupplyPlan plan = Wanting({MakeGrant(0, 5, 1)});
  PlanGrants(/*free=*/9, {{3, 2}, {4, 1}}, Source::kDonors, &plan);
  EXPECT_EQ(plan.blocks_moved(), 3);
  EXPECT_EQ(plan.grants[0].claimed, 1);
}

TEST(SupplyTest, DonorsReturnNoMoreThanIsAsked) {
  SupplyPlan plan;
  PlanReturns(5, {{0, 3}, {1, 3}, {2, 3}}, &plan);
  EXPECT_EQ(plan.returns.size(), std::size_t{2});
  EXPECT_EQ(plan.returns[1].blocks, 2);
}

// A slot table and a supply without a pool; slots 0 and 1 are parked, in this order.
struct Fixture {
  explicit Fixture(std::int64_t blocks, Layout layout = Layout::kPerLayer)
      : geometry(SmallGeometry(layout)), ranges(geometry.num_ranges()), table(geometry) {
    std::unique_ptr<Arena> made;
    EXPECT_OK(Arena::Make(geometry, blocks * ranges, MakeVmm(geometry), &made));
    supply = std::make_unique<Supply>(&table, std::move(made), nullptr, false);
  }
  void Park(std::int32_t slot) {
    const StateLock state = table.Lock();
    table.Occupy(state, slot, 0);
    table.StartDraining(state, slot);
    table.Vacate(state, slot);
  }
  const Geometry geometry;
  const std::int64_t ranges;
  SlotTable table;
  std::unique_ptr<Supply> supply;
};

// Returns which blocks the parked slots map, and where.
std::vector<std::vector<std::int32_t>> ParkedBlocks(const Fixture& f, const Arena& arena) {
  std::vector<std::vector<std::int32_t>> maps;
  for (std::int64_t slot = 0; slot < 2; ++slot) {
    for (std::int64_t range = 0; range < f.ranges; ++range) maps.push_back(arena.block_map(slot, range));
  }
  return maps;
}

TEST(SupplyTest, AnUndoneOrFailedPlanLeavesEveryBlockWhereItWas) {
  for (const bool fails : {false, true}) {
    Fixture f(8);
    const MappingLock lock = f.supply->Lock();
    Arena& arena = f.supply->arena(lock);
    EXPECT_OK(arena.Grow(0, 3));
    EXPECT_OK(arena.Grow(1, 3));
    f.Park(0);
    f.Park(1);
    const auto before = ParkedBlocks(f, arena);
    SupplyPlan plan;
    EXPECT_OK(f.supply->Plan(lock, {{2, 6}, {3, 1}}, Source::kFree, &plan).status);
    EXPECT_EQ(plan.blocks_moved(), 5);
    EXPECT_EQ(plan.grants[0].claimed, 2);
    if (fails) {
      plan.grants[1].wanted = 2;  // one more than there is
      bool system_short = false;
      EXPECT_TRUE(f.supply->Apply(lock, plan, &system_short).code() == Code::kResourceExhausted);
      EXPECT_TRUE(system_short);
    } else {
      EXPECT_OK(f.supply->Apply(lock, plan));
      EXPECT_EQ(arena.blocks(2), 6);
      EXPECT_EQ(arena.blocks(0) + arena.blocks(1), 1);
      f.supply->Undo(lock, plan);
    }
    EXPECT_TRUE(ParkedBlocks(f, arena) == before);
    EXPECT_EQ(arena.blocks(2) + arena.blocks(3), 0);
    EXPECT_EQ(arena.pool().num_free(), 2 * f.ranges);
  }
}

TEST(SupplyTest, SharedBlocksAreNotCountedOnAndNotMoved) {
  Fixture f(8);
  const MappingLock lock = f.supply->Lock();
  Arena& arena = f.supply->arena(lock);
  EXPECT_OK(arena.Grow(0, 4));
  EXPECT_OK(arena.Alias(0, 1, 3));
  f.table.Occupy(f.table.Lock(), 1, 48);
  f.Park(0);
  Claim claim;
  f.supply->Tally(lock, {}, &claim);
  EXPECT_EQ(claim.free, 4 * f.ranges);
  EXPECT_EQ(claim.reclaimable, f.ranges) << "unmapping a shared block in one slot does not free it";
  SupplyPlan plan;
  claim = f.supply->Plan(lock, {{2, 6}}, Source::kFree, &plan);
  EXPECT_TRUE(claim.status.code() == Code::kResourceExhausted) << "4 blocks are parked, but 3 are shared";
  EXPECT_OK(f.supply->Reserve(lock, {{2, 5}}, &plan).status);
  EXPECT_EQ(plan.blocks_moved(), 1);
  EXPECT_EQ(arena.blocks(0), 3);
  EXPECT_EQ(arena.blocks(1), 3);
}

TEST(SupplyTest, AFreeSlotGivesUpWhatItHasFromOthers) {
  Fixture f(8);
  const MappingLock lock = f.supply->Lock();
  Arena& arena = f.supply->arena(lock);
  EXPECT_OK(arena.Grow(0, 4));
  EXPECT_OK(arena.Alias(0, 1, 3));
  f.Park(0);
  f.Park(1);
  Claim claim;
  f.supply->Tally(lock, {}, &claim);
  EXPECT_EQ(claim.reclaimable, 4 * f.ranges);
  EXPECT_EQ(arena.blocks(1), 0);
  EXPECT_EQ(arena.pool().num_shared(), 0);
}

TEST(SupplyTest, ReclaimingFreesWhatItPromises) {
  Fixture f(8);
  const MappingLock lock = f.supply->Lock();
  Arena& arena = f.supply->arena(lock);
  EXPECT_OK(arena.Grow(0, 4));
  EXPECT_OK(arena.Alias(0, 1, 2));
  f.Park(0);
  f.Park(1);
  EXPECT_OK(f.supply->Apply(lock, f.supply->PlanReclaim(lock, f.ranges + 1)));
  EXPECT_EQ(arena.pool().num_free(), 6 * f.ranges);
  EXPECT_EQ(arena.blocks(0), 2);
  EXPECT_OK(f.supply->Apply(lock, f.supply->PlanTrim(lock)));
  EXPECT_EQ(arena.pool().num_free(), 8 * f.ranges) << "trim unmaps shared blocks as well";
}

TEST(SupplyTest, DrainingBlocksThatALiveSlotMapsAreNotPromised) {
  Fixture f(8);
  const MappingLock lock = f.supply->Lock();
  Arena& arena = f.supply->arena(lock);
  EXPECT_OK(arena.Grow(0, 4));
  EXPECT_OK(arena.Alias(0, 1, 3));
  {
    const StateLock state = f.table.Lock();
    f.table.Occupy(state, 0, 0);
    f.table.Occupy(state, 1, 48);
    f.table.StartDraining(state, 0);
  }
  Claim claim;
  f.supply->Tally(lock, {}, &claim);
  EXPECT_EQ(claim.draining, f.ranges);
  EXPECT_EQ(claim.reclaimable, 0);
}

}  // namespace
}  // namespace kvpage::testing
