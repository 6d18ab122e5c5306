// map_slots in pools that act as one, each on a different device with its own mirror and context: the first to call
// decides, the others fetch the decision, and either all mirrors have the room or none.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "tests/joint_devices_util.h"

namespace kvpage::testing {
namespace {

class JointDevicesTest : public ::testing::TestWithParam<int> {};

TEST_P(JointDevicesTest, TheFirstDecidesAndAllMirrorsHaveTheRoom) {
  JointDevices joint(GetParam(), 8);
  const std::int32_t slot = joint.Acquire(16);
  const int last = joint.size() - 1;
  EXPECT_TRUE(joint.MapOne(last, slot, 40));
  for (int i = 0; i < joint.size(); ++i) EXPECT_EQ(joint.Room(i, slot), 48) << "device " << i;
  joint.programs[last]->Write(slot, 40);
  EXPECT_TRUE(joint.MapOne(last, slot, 64));  // this device continues, and is two decisions ahead
  joint.programs[last]->Write(slot, 24);
  EXPECT_EQ(joint.joint->numbers().pending, 2);
  for (int i = 0; i < last; ++i) {
    EXPECT_TRUE(joint.MapOne(i, slot, 40));
    joint.programs[i]->Write(slot, 40);
    EXPECT_TRUE(joint.MapOne(i, slot, 64));
    joint.programs[i]->Write(slot, 24);
  }
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.decisions, 2);
  EXPECT_EQ(numbers.fetched, 2 * last);
  EXPECT_EQ(numbers.pending, 0);
  for (const auto& program : joint.programs) EXPECT_EQ(program->length(slot), 64);
  joint.ExpectEqual();
  joint.ExpectNoFaults();
}

TEST_P(JointDevicesTest, WhatADeviceHasNotGivenUpIsNotTaken) {
  JointDevices joint(GetParam(), 4);
  const int last = joint.size() - 1;
  const std::int32_t a = joint.Acquire(32), b = joint.Acquire(32);
  joint.machine.fake().HoldStream(joint.machine.stream(last));
  joint.Release(b);  // it has run on all devices but one
  EXPECT_FALSE(joint.MapOne(0, a, 48));
  joint.machine.fake().ReleaseStream(joint.machine.stream(last));
  // There would be enough by now, but device 0 was told that there is not.
  for (int i = 1; i < joint.size(); ++i) EXPECT_FALSE(joint.MapOne(i, a, 48)) << "device " << i;
  for (int i = last; i >= 0; --i) EXPECT_TRUE(joint.MapOne(i, a, 48)) << "device " << i;  // moved from the parked slot
  joint.ExpectEqual();
  joint.ExpectNoFaults();
}

TEST_P(JointDevicesTest, BlocksThatASlotHasAlreadyBecomeRoomEverywhere) {
  JointDevices joint(GetParam(), 8);
  const std::int32_t parked = joint.Acquire(64);
  joint.Release(parked);
  const std::int32_t slot = joint.Acquire(1);  // adopts four blocks, but has room in one
  EXPECT_EQ(slot, parked);
  EXPECT_EQ(joint.Room(0, slot), 16);
  for (int i = 0; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 50));
  joint.ExpectEqual();
  for (const auto& program : joint.programs) program->Write(slot, 50);
  joint.ExpectNoFaults();
}

// Which parked slot gives its blocks first must not depend on when a pool has looked at its device.
TEST_P(JointDevicesTest, SlotsParkInTheOrderOfTheirReleases) {
  JointDevices joint(GetParam(), 4);
  const std::int32_t a = joint.Acquire(16), b = joint.Acquire(16), c = joint.Acquire(16);
  const std::int32_t last = joint.Acquire(16);
  for (const std::int32_t slot : {c, a, b}) joint.StartReleaseOf(slot);
  for (const std::int32_t slot : {c, a, b}) {
    for (const auto& program : joint.programs) program->Release(slot);
    joint.pools[0]->Numbers();  // the other pools look once, at the end
  }
  for (const std::int64_t tokens : {32, 48}) {
    for (const auto& pool : joint.pools) EXPECT_OK(pool->Extend({last}, {tokens}).status);
    joint.ExpectEqual();
  }
}

// After a refused call, the device and the others continue.
TEST_P(JointDevicesTest, RefusedCallsCountToo) {
  JointDevices joint(GetParam(), 8);
  const std::int32_t slot = joint.Acquire(16);
  const std::int32_t generation = joint.starts[0].generation;
  joint.pools[0]->PassOverMap(generation);  // before the others reach the call
  for (int i = 1; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 32));
  EXPECT_EQ(joint.joint->numbers().pending, 0);
  EXPECT_TRUE(joint.MapOne(0, slot, 48));
  for (int i = 1; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 48));
  EXPECT_TRUE(joint.MapOne(1, slot, 64));
  joint.pools[0]->PassOverMap(generation);  // after one of them has
  for (int i = 2; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 64));
  EXPECT_EQ(joint.joint->numbers().pending, 0);
  joint.pools[0]->PassOverMap(generation - 1);  // an older generation's program: not a call of this one
  for (int i = 0; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 80));
  const JointMaps::Numbers numbers = joint.joint->numbers();
  EXPECT_EQ(numbers.decisions, 4);
  EXPECT_EQ(numbers.pending, 0);
  joint.ExpectEqual();
}

TEST_P(JointDevicesTest, Generations) {
  JointDevices joint(GetParam(), 8);
  const std::int32_t slot = joint.Acquire(16);
  EXPECT_TRUE(joint.MapOne(0, slot, 32));  // the other devices never reach the call
  EXPECT_EQ(joint.joint->numbers().pending, 1);
  joint.Restart();
  EXPECT_EQ(joint.joint->numbers().pending, 0);
  for (int i = joint.size() - 1; i >= 0; --i) EXPECT_TRUE(joint.MapOne(i, slot, 48));
  joint.ExpectEqual();
  // While the pools start their generations one after the other, nothing is decided.
  Pool::Generation made;
  EXPECT_OK(joint.pools[0]->NewGeneration(&made));
  for (const int device : {0, 1}) {
    const Mapped between = joint.Map(device, {slot}, {64});
    EXPECT_EQ(between.status.code(), Code::kFailedPrecondition);
    EXPECT_TRUE(Mentions(between.status, "generation")) << between.status.message();
  }
  joint.ExpectEqual();
  joint.Restart();
  for (int i = 0; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 64));
  joint.ExpectEqual();
}

TEST_P(JointDevicesTest, WrongCalls) {
  JointDevices joint(GetParam(), 8);
  const std::int32_t slot = joint.Acquire(16);
  EXPECT_TRUE(joint.MapOne(0, slot, 32));
  const Mapped other = joint.Map(1, {slot}, {33});
  EXPECT_EQ(other.status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Mentions(other.status, "the devices of the mesh request different blocks")) << other.status.message();
  EXPECT_FALSE(joint.Map(1, {3}, {32}).status.ok());       // free
  EXPECT_FALSE(joint.Map(1, {kSlots}, {32}).status.ok());  // no such slot
  for (int i = 1; i < joint.size(); ++i) EXPECT_TRUE(joint.MapOne(i, slot, 32));
  const std::vector<std::int32_t> slots = {slot, -1}, tokens = {1000, -5};
  for (int i = 0; i < joint.size(); ++i) EXPECT_EQ(joint.Map(i, slots, tokens).ok, (std::vector<char>{0, 1}));
  joint.ExpectEqual();
  joint.pools[1]->Close();
  EXPECT_EQ(joint.Map(0, {slot}, {48}).status.reason(), Reason::kClosed);
}

TEST(JoinTest, PoolsThatCannotStandForOne) {
  Machine machine(2);
  std::shared_ptr<JointMaps> joint;
  EXPECT_FALSE(Pool::Join({machine.MakePool(1, 4, 0), machine.MakePool(2, 4, 0)}, &joint).ok());  // the same device
  const std::vector<std::shared_ptr<Pool>> pools = {machine.MakePool(3, 4, 0), machine.MakePool(4, 4, 1)};
  EXPECT_OK(Pool::Join(pools, &joint));
  EXPECT_FALSE(Pool::Join(pools, &joint).ok());  // they are already joined
}

INSTANTIATE_TEST_SUITE_P(Devices, JointDevicesTest, ::testing::Values(2, 4));

// ---- driver failures ----

struct Kind {
  const char* name;
  bool parked;  // whether blocks come from a parked slot
  bool poison;
};

class JointDeviceFaultsTest : public ::testing::TestWithParam<std::tuple<int, int, Kind>> {};

// Each driver call fails once, whichever device it is for.
TEST_P(JointDeviceFaultsTest, AllOrNone) {
  const auto [devices, result, kind] = GetParam();
  int failures = 0;
  for (std::int64_t call = 1;; ++call) {
    PoolOptions options;
    options.poison = kind.poison;
    JointDevices joint(devices, 10, options);
    const std::int32_t slot = joint.Acquire(16);
    if (kind.parked) joint.Release(joint.Acquire(112));  // 2 blocks are free
    for (const auto& program : joint.programs) program->Write(slot, 16);
    const std::int64_t faults = joint.machine.fake().faults();
    joint.machine.fake().FailAtAny(call, cu::Result{result});
    const Mapped first = joint.Map(devices - 1, {slot}, {96});
    joint.machine.fake().ClearFaults();
    SCOPED_TRACE("call " + std::to_string(call));
    if (joint.machine.fake().faults() == faults) {
      EXPECT_OK(first.status);
      EXPECT_EQ(first.ok, std::vector<char>{1});
      break;
    }
    const bool mapped = first.status.ok() && first.ok[0] != 0;
    failures += mapped ? 0 : 1;
    for (int i = 0; i < devices; ++i) {
      EXPECT_EQ(joint.Room(i, slot), mapped ? 96 : 16) << "device " << i;
      EXPECT_EQ(joint.pools[i]->Rows()[0].blocks, mapped ? 6 : 1) << "device " << i;
    }
    joint.ExpectEqual();
    for (int i = 0; i < devices - 1; ++i) {
      const Mapped later = joint.Map(i, {slot}, {96});
      EXPECT_EQ(later.status.message(), first.status.message());
      EXPECT_EQ(later.ok, first.ok);
    }
    if (!first.status.ok()) joint.Restart();
    // The host's next call finds all pools in agreement again, and so does the next decision.
    joint.joint->EnterHost();
    for (const auto& pool : joint.pools) EXPECT_OK(pool->Extend({slot}, {33}).status);
    joint.joint->LeaveHost();
    joint.ExpectEqual();
    for (int i = 0; i < devices; ++i) EXPECT_TRUE(joint.MapOne(i, slot, 128));
    joint.ExpectEqual();
    for (const auto& program : joint.programs) program->Write(slot, 112);
    joint.ExpectNoFaults();
  }
  // If a device has no memory left, the blocks of the parked slot suffice.
  if (kind.parked && result == 2) {
    EXPECT_EQ(failures, 0);
  } else {
    EXPECT_GE(failures, 3 * devices);
  }
}

INSTANTIATE_TEST_SUITE_P(All, JointDeviceFaultsTest,
                         ::testing::Combine(::testing::Values(2, 4), ::testing::Values(2, 999),
                                            ::testing::Values(Kind{"Free", false, false}, Kind{"Parked", true, false},
                                                              Kind{"Poison", false, true})),
                         [](const auto& info) {
                           return std::string(std::get<2>(info.param).name) + std::to_string(std::get<0>(info.param)) +
                                  "Answer" + std::to_string(std::get<1>(info.param));
                         });

// The n-th copy to a device and all later ones fail, including those that would take the room back.
TEST(JointRollbackTest, WhatCannotBeTakenBackStaysMapped) {
  int kept = 0;
  for (int n = 1; n <= 4; ++n) {
    JointDevices joint(4, 10);
    const std::int32_t slot = joint.Acquire(16);
    joint.machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, n, cu::Result::kUnknown, 1000);
    EXPECT_FALSE(joint.Map(0, {slot}, {64}).status.ok());
    joint.machine.fake().ClearFaults();
    joint.ExpectSafe();
    for (int i = 0; i < 4; ++i) kept += joint.Room(i, slot) == 64;
    joint.Restart();
    joint.joint->EnterHost();
    for (const auto& pool : joint.pools) EXPECT_OK(pool->Extend({slot}, {64}).status);
    joint.joint->LeaveHost();
    for (int i = 0; i < 4; ++i) EXPECT_EQ(joint.Room(i, slot), 64);
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(joint.MapOne(i, slot, 100));
    joint.ExpectSafe();
    for (const auto& program : joint.programs) program->Write(slot, 100);
    joint.ExpectNoFaults();
  }
  EXPECT_EQ(kept, 0 + 1 + 2 + 3);
}

// An extend that failed on another device is taken back.
TEST(JointRollbackTest, RetractedRoomIsTakenFromPrograms) {
  int failures = 0;
  for (std::int64_t call = 1;; ++call) {
    JointDevices joint(2, 10);
    const std::int32_t slot = joint.Acquire(16);
    EXPECT_OK(joint.pools[0]->Extend({slot}, {64}).status);
    EXPECT_EQ(joint.Room(0, slot), 64);
    const std::int64_t faults = joint.machine.fake().faults();
    joint.machine.fake().FailAtAny(call, cu::Result::kUnknown);
    const Status status = joint.pools[0]->Retract(slot, 16, 0);
    joint.machine.fake().ClearFaults();
    const bool struck = joint.machine.fake().faults() > faults;
    EXPECT_TRUE(status.ok() || struck) << status.message();
    failures += status.ok() ? 0 : 1;
    if (!status.ok()) {
      EXPECT_OK(joint.pools[0]->Retract(slot, 16, 0));
    }
    std::int64_t freed = 0;
    EXPECT_OK(joint.pools[0]->Trim(&freed));
    joint.Restart();
    joint.ExpectEqual();
    EXPECT_EQ(joint.Room(0, slot), 16);
    EXPECT_EQ(joint.pools[0]->Rows()[0].blocks, 1);
    for (int i = 0; i < 2; ++i) EXPECT_TRUE(joint.MapOne(i, slot, 40));
    for (const auto& program : joint.programs) program->Write(slot, 40);
    joint.ExpectNoFaults();
    if (!struck) break;
  }
  EXPECT_GT(failures, 3);
}

// A program that has passed its check may have seen the room that is taken back: its memory stays until it has ended.
TEST(JointRollbackTest, RoomIsNotTakenFromRunningPrograms) {
  JointDevices joint(2, 10);
  const std::int32_t slot = joint.Acquire(16);
  joint.programs[0]->HoldAfterCheck(joint.machine.stream(0));
  joint.programs[0]->Write(slot, 4);
  joint.machine.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 2, cu::Result::kUnknown);  // the copy to device 1
  std::atomic<bool> done{false};
  Status status;
  std::thread handler([&] {
    status = joint.Map(1, {slot}, {64}).status;
    done = true;
  });
  Pause();
  EXPECT_FALSE(done);
  EXPECT_TRUE(Becomes(joint.machine.Find(JointDevices::kFirstId)->slots[slot].room, 16));
  joint.machine.fake().ReleaseStream(joint.machine.stream(0));
  handler.join();
  joint.machine.fake().ClearFaults();
  EXPECT_FALSE(status.ok());
  joint.ExpectEqual();
  EXPECT_EQ(joint.pools[0]->Rows()[0].blocks, 1);
  joint.ExpectNoFaults();
}

}  // namespace
}  // namespace kvpage::testing
