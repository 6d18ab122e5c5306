// A mapping that fails in one of several pools takes effect in none.
#include <gtest/gtest.h>

#include <string>

#include "tests/joint_util.h"

namespace kvpage::testing {
namespace {

std::string Name(Verb verb) {
  return verb == Verb::kCreate ? "Create" : verb == Verb::kMap ? "Map" : verb == Verb::kMove ? "Move" : "Fill";
}

// The counts of a pool, except for which free blocks have memory.
std::vector<std::int64_t> Counts(Pool& pool) {
  const PoolNumbers n = pool.Numbers();
  std::vector<std::int64_t> counts = {n.blocks_mapped, n.blocks_parked, n.blocks_draining, n.blocks_free};
  for (const SlotRow& row : pool.Rows()) counts.insert(counts.end(), {row.slot, row.blocks, row.reserved});
  return counts;
}

class JointFaultsTest : public ::testing::TestWithParam<std::tuple<Layout, Verb, int>> {};

TEST_P(JointFaultsTest, RollsAllBack) {
  const auto [layout, verb, failing] = GetParam();
  const Geometry geometry = SmallGeometry(layout);
  const std::int64_t ranges = geometry.num_ranges();
  const bool moves = verb == Verb::kMove;
  for (int call = 0;; ++call) {
    JointPools joint(3, 10 * ranges, geometry, {false, /*poison=*/verb == Verb::kFill});
    const std::int32_t a = joint.Acquire(16), b = joint.Acquire(moves ? 112 : 16);
    if (moves) joint.Release(b);  // 2 blocks are free, the rest comes from the parked slot
    const std::vector<std::int64_t> before = Counts(*joint.pools[0]);
    joint.vmms[failing]->FailAt(verb, call);
    const bool ok = joint.MapOne(1, a, 96);
    const bool failed = joint.vmms[failing]->failed();
    joint.vmms[failing]->FailAt(Verb::kNone, -1);
    SCOPED_TRACE(Name(verb) + " call " + std::to_string(call) + " on device " + std::to_string(failing));
    if (!failed) {
      EXPECT_TRUE(ok);
      EXPECT_GT(call, 0);
      break;
    }
    if (!ok) {
      for (const auto& pool : joint.pools) EXPECT_EQ(Counts(*pool), before);
    }
    joint.ExpectEqual();
    for (const int device : {0, 2}) EXPECT_EQ(joint.MapOne(device, a, 96), ok);
    // The host's next call finds all pools in agreement again, and so does the next decision.
    joint.joint->EnterHost();
    for (const auto& pool : joint.pools) EXPECT_OK(pool->Extend({a}, {33}).status);
    joint.joint->LeaveHost();
    joint.ExpectEqual();
    EXPECT_TRUE(joint.MapOne(2, a, 128));
    EXPECT_TRUE(joint.MapOne(0, a, 128));
    joint.ExpectEqual();
  }
}

#ifdef KVPAGE_TEST_FAKE_DRIVER
// Each driver call fails once, whichever device it is for.
TEST(JointDriverFaultsTest, RollAllBack) {
  for (const int result : {2, 999}) {  // out of memory, unknown
    for (std::int64_t call = 1;; ++call) {
      JointPools joint(4, 10);
      const std::int32_t slot = joint.Acquire(16);
      const std::vector<std::int64_t> before = Counts(*joint.pools[0]);
      const std::int64_t faults = Fake().faults();
      Fake().FailAtAny(call, cu::Result{result});
      const Mapped first = joint.Map(3, {slot}, {96});
      Fake().ClearFaults();
      SCOPED_TRACE("call " + std::to_string(call) + " answers " + std::to_string(result));
      if (Fake().faults() == faults) {
        EXPECT_OK(first.status);
        EXPECT_GT(call, 4);
        break;
      }
      const bool mapped = first.status.ok() && first.ok[0] != 0;
      if (!mapped) {
        for (const auto& pool : joint.pools) EXPECT_EQ(Counts(*pool), before);
      }
      joint.ExpectEqual();
      for (const int device : {0, 1, 2}) {
        const Mapped later = joint.Map(device, {slot}, {96});
        EXPECT_EQ(later.status.message(), first.status.message());
        EXPECT_EQ(later.ok, first.ok);
      }
      if (!first.status.ok()) joint.Restart();
      EXPECT_TRUE(joint.MapOne(0, slot, 96));
      EXPECT_TRUE(joint.MapOne(3, slot, 96));
      joint.ExpectEqual();
    }
  }
}
#endif

INSTANTIATE_TEST_SUITE_P(All, JointFaultsTest,
                         ::testing::Combine(::testing::Values(Layout::kFused, Layout::kPerLayer),
                                            ::testing::Values(Verb::kCreate, Verb::kMap, Verb::kMove, Verb::kFill),
                                            ::testing::Values(0, 1, 2)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == Layout::kFused ? "Fused" : "PerLayer") +
                                  Name(std::get<1>(info.param)) + std::to_string(std::get<2>(info.param));
                         });

}  // namespace
}  // namespace kvpage::testing
