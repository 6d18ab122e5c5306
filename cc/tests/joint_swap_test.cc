// A sequence is swapped out of several pools that act as one, and back, in all of them at once.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "tests/joint_swap_util.h"

namespace kvpage::testing {
namespace {

TEST_P(JointSwapTest, ItGoesOnWithTheLastDevice) {
  const std::int32_t parent = Begin(40, 1), child = program(0)->Fork(parent);
  for (int i = 1; i < kDevices; ++i) EXPECT_EQ(program(i)->Fork(parent), child);
  Write(child, 30, 2);
  const auto swap = StartOut(child);
  OnEach([&](int i) {
    EXPECT_EQ(StateOf(*swap), SwapState::kQueued);
    EXPECT_OK(program(i)->Vacate(child));
  });
  EXPECT_TRUE(Soon([&] { return swap->stored(); }));
  EXPECT_EQ(swap->tokens(), 70);
  ExpectEqual();
  EXPECT_EQ(pool(0)->Numbers().blocks_swapped, 2 * ranges());  // the shared ones
  EXPECT_EQ(store_->Numbers().bytes_swapped, kDevices * 3 * ranges() * geometry_.block_bytes);
  Prefetch(swap.get());
  ASSERT_TRUE(swap->Wait(60));
  EXPECT_EQ(swap->tokens_in_memory(), 70);
  const std::int32_t back = In(swap.get());
  ExpectStamped(back, 0, 40, 1);
  ExpectStamped(back, 40, 70, 2);
  Write(back, 10, 3);
  ExpectStamped(back, 70, 80, 3);
  ExpectStamped(parent, 0, 40, 1);
  EXPECT_TRUE(swap->gone());
  ExpectNothingLeft();
}

TEST_P(JointSwapTest, NotDuringACallOfTheHosts) {
  const std::int32_t slot = Begin(40, 1);
  const auto swap = StartOut(slot);
  joint_.joint->EnterHost();
  Vacate(slot);
  EXPECT_EQ(StateOf(*swap), SwapState::kQueued);
  io_->held_write = 0;
  joint_.joint->LeaveHost();
  EXPECT_EQ(StateOf(*swap), SwapState::kWriting);
  joint_.joint->EnterHost();
  io_->held_write = -1;
  EXPECT_TRUE(Soon([&] { return io_->writes == kDevices; }));
  usleep(10000);
  EXPECT_EQ(StateOf(*swap), SwapState::kWriting);
  EXPECT_EQ(pool(1)->Numbers().blocks_draining, 3 * ranges());
  joint_.joint->LeaveHost();
  EXPECT_TRUE(Soon([&] { return swap->stored(); }));
  EXPECT_EQ(pool(1)->SwapWrites(), 0);
  ToMemory(swap.get());
  ExpectStamped(In(swap.get()), 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapTest, BlocksComeFreeWhenAllPartsAreWritten) {
  std::int32_t slot = Begin(40, 1);
  for (int held = 0; held < kDevices; ++held) {
    io_->writes = 0;
    io_->held_write = held;
    const auto swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return io_->writes == held + 1; }));
    EXPECT_EQ(StateOf(*swap), SwapState::kWriting);
    EXPECT_EQ(pool(0)->Numbers().blocks_draining, 3 * ranges());
    ExpectEqual();
    io_->held_write = -1;
    EXPECT_TRUE(Soon([&] { return swap->stored(); }));
    EXPECT_EQ(pool(0)->Numbers().blocks_draining, 0);
    io_->reads = 0;
    io_->held_read = held;
    Prefetch(swap.get());
    EXPECT_TRUE(Soon([&] { return io_->reads == held + 1; }));
    EXPECT_EQ(StateOf(*swap), SwapState::kReading);
    EXPECT_EQ(swap->tokens_in_memory(), 0);
    EXPECT_FALSE(swap->Wait(0));
    io_->held_read = -1;
    EXPECT_TRUE(swap->Wait(60));
    slot = In(swap.get());
    ExpectStamped(slot, 0, 40, 1);
    ExpectEqual();
  }
  ExpectNothingLeft();
}

TEST_P(JointSwapTest, WantedWhileItIsWritten) {
  io_->held_write = 1;
  const auto swap = Out(Begin(40, 1));
  EXPECT_TRUE(Soon([&] { return io_->writes == 2; }));
  Prefetch(swap.get());
  EXPECT_EQ(StateOf(*swap), SwapState::kMemory);
  const std::int32_t back = In(swap.get());
  Write(back, 10, 2);  // while the rest of the old contents is being written
  io_->held_write = -1;
  EXPECT_TRUE(Soon([&] { return pool(0)->SwapWrites() == 0; }));
  ExpectStamped(back, 0, 40, 1);
  ExpectStamped(back, 40, 50, 2);
  ExpectNothingLeft();
}

TEST_P(JointSwapTest, AReaderOnOneDeviceDelaysAll) {
  const std::int32_t slot = Begin(40, 1);
  AsHost([&](int i) { EXPECT_OK(pool(i)->Extend({slot}, {48}).status); });
  auto writer = std::make_unique<PinnedSlots>(), reader = std::make_unique<PinnedSlots>();
  ASSERT_OK(program(1)->Begin(slot, 1, 0, true, writer.get()));
  program(1)->SetEpoch(writer->epoch());
  writer.reset();
  ASSERT_OK(program(1)->Begin(slot, 1, 0, false, reader.get()));
  const auto swap = Out(slot);
  EXPECT_EQ(StateOf(*swap), SwapState::kQueued);
  EXPECT_FALSE(swap->Wait(0));
  reader.reset();
  EXPECT_TRUE(swap->Wait(0));
  EXPECT_TRUE(Soon([&] { return swap->stored(); }));
  ExpectEqual();
  ToMemory(swap.get());
  ExpectStamped(In(swap.get()), 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapTest, DevicesAtTheirOwnPace) {
  for (int round = 0; round < 60; ++round) {
    const std::int32_t one = Begin(40, 1), two = Begin(20 + round, 2);
    const auto swap = StartOut(one);
    std::vector<std::thread> devices;
    OnEach([&](int i) {
      devices.emplace_back([&, i] {
        usleep(static_cast<unsigned>(100 * ((round + i) % kDevices)));
        EXPECT_OK(program(i)->Vacate(one));
      });
    });
    for (int call = 0; call < 3; ++call) {
      AsHost([&](int i) { EXPECT_OK(pool(i)->Extend({two}, {90 + 10 * call}).status); });
    }
    if (round % 2 == 0) AsHost([&](int i) { EXPECT_OK(swap->StartRead(i).status); });
    for (std::thread& device : devices) device.join();
    ToMemory(swap.get());
    const std::int32_t back = In(swap.get());
    ExpectStamped(back, 0, 40, 1);
    ExpectStamped(two, 0, 20 + round, 2);
    ExpectEqual();
    joint_.Release(back);
    joint_.Release(two);
  }
  ExpectNothingLeft();
}

INSTANTIATE_TEST_SUITE_P(All, JointSwapTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
