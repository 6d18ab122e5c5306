// map_slots in pools that act as one: the first to call decides, the others fetch the decision.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/joint_util.h"
#include "tests/prefix_util.h"

namespace kvpage::testing {
namespace {

class JointMapsTest : public ::testing::TestWithParam<Layout> {
 protected:
  Geometry geometry() const { return SmallGeometry(GetParam()); }
  std::int64_t Blocks(std::int64_t logical) const { return logical * geometry().num_ranges(); }
};

TEST_P(JointMapsTest, TheFirstDecidesAndMapsForAll) {
  JointPools joint(3, Blocks(8), geometry());
  const std::int32_t slot = joint.Acquire(16);
  EXPECT_TRUE(joint.MapOne(1, slot, 40));
  for (const auto& pool : joint.pools) EXPECT_EQ(pool->Rows()[0].reserved, 40);
  joint.ExpectEqual();
  // Device 1 continues, and is two decisions ahead.
  EXPECT_OK(joint.programs[1]->Write(slot, 40));
  EXPECT_TRUE(joint.MapOne(1, slot, 64));
  EXPECT_EQ(joint.joint->numbers().pending, 2);
  for (const int device : {2, 0}) {
    EXPECT_TRUE(joint.MapOne(device, slot, 40));
    EXPECT_OK(joint.programs[device]->Write(slot, 40));
    EXPECT_TRUE(joint.MapOne(device, slot, 64));
  }
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.decisions, 2);
  EXPECT_EQ(numbers.fetched, 4);
  EXPECT_EQ(numbers.pending, 0);
  joint.ExpectEqual();
}

TEST_P(JointMapsTest, ADecisionIsKeptThoughThingsChange) {
  JointPools joint(2, Blocks(4), geometry());
  const std::int32_t a = joint.Acquire(32), b = joint.Acquire(32);
  EXPECT_FALSE(joint.MapOne(0, a, 48));  // no block is left
  joint.StartReleaseOf(b);
  EXPECT_OK(joint.programs[0]->Vacate(b));
  // The other device has not vacated the slot, so none of its blocks may be taken yet.
  EXPECT_FALSE(joint.MapOne(0, a, 48));
  EXPECT_FALSE(joint.MapOne(1, a, 48));
  EXPECT_OK(joint.programs[1]->Vacate(b));
  // There would be enough by now, but device 0 was told that there is not.
  EXPECT_FALSE(joint.MapOne(1, a, 48));
  EXPECT_TRUE(joint.MapOne(1, a, 48));
  EXPECT_TRUE(joint.MapOne(0, a, 48));
  joint.ExpectEqual();
  for (const auto& pool : joint.pools) EXPECT_EQ(pool->Rows()[0].blocks, Blocks(3));
}

TEST_P(JointMapsTest, RoomThatTheHostMakesMeanwhileChangesNoDecision) {
  JointPools joint(2, Blocks(2), geometry());
  const std::int32_t slot = joint.Acquire(32);
  EXPECT_FALSE(joint.MapOne(0, slot, 48));
  for (const auto& pool : joint.pools) {
    EXPECT_OK(pool->Resize(Blocks(3) * geometry().block_bytes).status);
    EXPECT_OK(pool->Extend({slot}, {48}).status);
  }
  EXPECT_FALSE(joint.MapOne(1, slot, 48));
  EXPECT_TRUE(joint.MapOne(1, slot, 48));
  EXPECT_TRUE(joint.MapOne(0, slot, 48));
}

TEST_P(JointMapsTest, SlotsEachForThemselves) {
  JointPools joint(2, Blocks(5), geometry());
  const std::int32_t a = joint.Acquire(16), b = joint.Acquire(16), c = joint.Acquire(16);
  const std::vector<std::int32_t> slots = {a, -1, b, c, -1}, tokens = {32, 0, 1000, 64, -5};
  const Mapped first = joint.Map(1, slots, tokens), second = joint.Map(0, slots, tokens);
  EXPECT_OK(first.status);
  EXPECT_EQ(first.ok, (std::vector<char>{1, 1, 0, 0, 1}));
  EXPECT_EQ(second.ok, first.ok);
  EXPECT_EQ(joint.pools[0]->Rows()[2].blocks, Blocks(1));  // it gets all that it needs, or nothing
  joint.ExpectEqual();
  EXPECT_EQ(joint.Map(0, {a, a}, {1, 1}).status.code(), Code::kInvalidArgument);
  EXPECT_FALSE(joint.Map(0, {a}, {-1}).status.ok());
  EXPECT_FALSE(joint.Map(1, {3}, {1}).status.ok());  // free
}

TEST_P(JointMapsTest, DevicesThatAskForDifferentThings) {
  JointPools joint(2, Blocks(8), geometry());
  const std::int32_t slot = joint.Acquire(16);
  EXPECT_TRUE(joint.MapOne(0, slot, 32));
  const Mapped other = joint.Map(1, {slot}, {33});
  EXPECT_EQ(other.status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(other.status, "slots [0] with [33] tokens here, slots [0] with [32] on another"))
      << other.status.message();
  EXPECT_TRUE(joint.MapOne(1, slot, 32));
}

TEST_P(JointMapsTest, Generations) {
  JointPools joint(2, Blocks(8), geometry());
  const std::int32_t slot = joint.Acquire(16);
  EXPECT_TRUE(joint.MapOne(0, slot, 32));  // device 1 never reaches the call
  EXPECT_EQ(joint.joint->numbers().pending, 1);
  joint.Restart();
  EXPECT_EQ(joint.joint->numbers().pending, 0);
  EXPECT_TRUE(joint.MapOne(1, slot, 48));  // device 1 is one epoch behind, which does not matter
  EXPECT_TRUE(joint.MapOne(0, slot, 48));
  EXPECT_EQ(joint.joint->numbers().fetched, 1);
  joint.ExpectEqual();
  // While the pools start their generations one after the other, nothing is decided.
  Pool::Generation made;
  EXPECT_OK(joint.pools[0]->NewGeneration(&made));
  const Mapped between = joint.Map(1, {slot}, {64});
  EXPECT_EQ(between.status.code(), Code::kFailedPrecondition);
  EXPECT_TRUE(Mentions(between.status, "generation")) << between.status.message();
  joint.ExpectEqual();
  joint.Restart();
  EXPECT_TRUE(joint.MapOne(1, slot, 64));
}

TEST_P(JointMapsTest, StepsThatAreRepeatedFromOneCache) {
  JointPools joint(2, Blocks(8), geometry(), {/*allow_stale=*/true, false});
  const std::int32_t slot = joint.Acquire(16);
  const std::uint32_t epoch = joint.programs[0]->cache().epoch;
  for (const int device : {0, 0, 1, 0, 1, 1}) {
    joint.programs[device]->SetEpoch(epoch);
    EXPECT_TRUE(joint.MapOne(device, slot, 32));
  }
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.decisions, 3);
  EXPECT_EQ(numbers.fetched, 3);
  EXPECT_EQ(numbers.pending, 0);
}

TEST_P(JointMapsTest, ClosedPools) {
  JointPools joint(2, Blocks(8), geometry());
  const std::int32_t slot = joint.Acquire(16);
  joint.pools[1]->Close();
  EXPECT_EQ(joint.Map(0, {slot}, {48}).status.reason(), Reason::kClosed);
  joint.pools[1].reset();
  EXPECT_EQ(joint.Map(0, {slot}, {48}).status.reason(), Reason::kClosed);
  std::shared_ptr<JointMaps> again;
  EXPECT_FALSE(Pool::Join({joint.pools[0]}, &again).ok());
}

TEST_P(JointMapsTest, DecisionsWaitForCallsOfTheHostButNotForLong) {
  JointPools joint(2, Blocks(8), geometry());
  const std::int32_t slot = joint.Acquire(16);
  joint.joint->EnterHost();
  EXPECT_OK(joint.pools[0]->Extend({slot}, {32}).status);
  bool ok = false;
  std::thread device([&] { ok = joint.MapOne(1, slot, 48); });
  for (int i = 0; i < 10000 && joint.joint->numbers().waits == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(joint.joint->numbers().waits, 1);
  EXPECT_OK(joint.pools[1]->Extend({slot}, {32}).status);
  EXPECT_EQ(joint.pools[1]->Rows()[0].blocks, Blocks(2));
  joint.joint->LeaveHost();
  device.join();
  EXPECT_TRUE(ok);
  EXPECT_TRUE(joint.MapOne(0, slot, 48));
  joint.ExpectEqual();
  // The host does not return: what it has done in only one pool is not relied upon, but other slots are served.
  joint.joint->EnterHost();
  const std::int32_t other = joint.Acquire(16);
  EXPECT_OK(joint.pools[0]->Extend({slot}, {64}).status);
  EXPECT_FALSE(joint.MapOne(1, slot, 80));
  EXPECT_FALSE(joint.MapOne(0, slot, 80));
  EXPECT_TRUE(joint.MapOne(1, other, 32));
  EXPECT_OK(joint.pools[1]->Extend({slot}, {64}).status);
  joint.joint->LeaveHost();
  EXPECT_TRUE(joint.MapOne(0, other, 32));
  EXPECT_TRUE(joint.MapOne(0, slot, 80));
  EXPECT_TRUE(joint.MapOne(1, slot, 80));
  joint.ExpectEqual();
}

TEST_P(JointMapsTest, ParkedSlotsGiveAlike) {
  JointPools joint(2, Blocks(4), geometry());
  const std::int32_t a = joint.Acquire(16), b = joint.Acquire(48);
  joint.Release(b);
  EXPECT_TRUE(joint.MapOne(0, a, 48));  // moved from the parked slot
  joint.ExpectEqual();
  EXPECT_TRUE(joint.MapOne(1, a, 48));
  EXPECT_TRUE(joint.MapOne(1, a, 64));
  EXPECT_TRUE(joint.MapOne(0, a, 64));
  joint.ExpectEqual();
}

TEST_P(JointMapsTest, CachedSequencesAreEvictedAlike) {
  JointPools joint(2, Blocks(6), geometry());
  const auto store = [&](std::int32_t id) {  // two blocks
    std::vector<std::int32_t> ids(32, id);
    std::int32_t slot = -1;
    for (int i = 0; i < 2; ++i) {
      const Claim claim = joint.programs[i]->AcquirePrefix(ids);
      slot = claim.slots[0];
      EXPECT_OK(joint.programs[i]->Write(slot, 32));
      EXPECT_OK(joint.pools[i]->Commit(slot, ids));
    }
    return slot;
  };
  const auto found = [&](int device, std::int32_t id) {
    std::int64_t tokens = 0;
    EXPECT_OK(joint.pools[device]->FindPrefix("", std::vector<std::int32_t>(32, id), true, &tokens));
    return tokens;
  };
  const std::int32_t first = store(1), second = store(2);
  const std::int32_t mine = joint.Acquire(32);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(found(i, 1), 32);
  joint.Release(second);
  joint.StartReleaseOf(first);
  EXPECT_OK(joint.programs[0]->Vacate(first));  // still in use on device 1
  EXPECT_TRUE(joint.MapOne(0, mine, 48));
  joint.ExpectEqual();
  EXPECT_FALSE(joint.MapOne(0, mine, 96));  // not enough even with the second sequence
  EXPECT_OK(joint.programs[1]->Vacate(first));
  EXPECT_TRUE(joint.MapOne(1, mine, 48));
  EXPECT_FALSE(joint.MapOne(1, mine, 96));
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(found(i, 1), 32) << "device " << i;
    EXPECT_EQ(found(i, 2), 16) << "device " << i;
  }
  EXPECT_TRUE(joint.MapOne(1, mine, 96));  // now that it is free everywhere
  EXPECT_TRUE(joint.MapOne(0, mine, 96));
  joint.ExpectEqual();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(found(i, 1) + found(i, 2), 0) << "device " << i;
}

INSTANTIATE_TEST_SUITE_P(Layouts, JointMapsTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
