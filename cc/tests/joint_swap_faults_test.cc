// A swap that fails in one of several pools takes effect in none, and ending early leaves nothing behind.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/joint_swap_util.h"

namespace kvpage::testing {
namespace {

using JointSwapFaultsTest = JointSwapTest;

TEST_P(JointSwapFaultsTest, APartThatIsNotWrittenKeepsAllInMemory) {
  std::int32_t slot = Begin(40, 1);
  for (int failing = 0; failing < kDevices; ++failing) {
    io_->writes = 0;
    io_->failing_write = failing;
    const auto swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return StateOf(*swap) == SwapState::kMemory; }));
    EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
    EXPECT_EQ(pool(0)->Numbers().blocks_draining, 0);
    EXPECT_EQ(pool(0)->SwapWrites(), 0);
    EXPECT_EQ(pool(0)->Numbers().swaps.bytes_swapped_out, 0);
    ExpectEqual();
    slot = In(swap.get());
    ExpectStamped(slot, 0, 40, 1);
    ExpectEqual();
  }
  EXPECT_EQ(store_->Numbers().failed_writes, kDevices);
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, APartThatCannotBeReadLosesAsMuchInAll) {
  const std::int32_t parent = Begin(40, 1);
  for (int failing = 0; failing < kDevices; ++failing) {
    const std::int32_t child = program(0)->Fork(parent);
    for (int i = 1; i < kDevices; ++i) EXPECT_EQ(program(i)->Fork(parent), child);
    const auto swap = OutToDisk(child);
    io_->reads = 0;
    io_->failing_read = failing;
    ToMemory(swap.get());
    EXPECT_EQ(StateOf(*swap), SwapState::kDamaged);
    EXPECT_EQ(swap->tokens_in_memory(), 32);
    EXPECT_NE(swap->error().find("(unreadable): the first 32 of 40 tokens are recoverable"), std::string::npos);
    ExpectEqual();
    AsHost([&](int i) { EXPECT_FALSE(pool(i)->SwapIn(swap->parts()[i]).status.ok()); });
    const std::int32_t back = In(swap.get(), /*recover=*/true);
    ExpectStamped(back, 0, 32, 1);
    EXPECT_EQ(program(0)->length(back), 32);
    ExpectEqual();
    joint_.Release(back);
  }
  ExpectStamped(parent, 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, MemoryThatOneDeviceHasNotGot) {
  const auto swap = OutToDisk(Begin(40, 1));
  OnEach([&](int i) {
    std::int64_t freed = 0;
    EXPECT_OK(pool(i)->Trim(&freed));
  });
  for (int failing = 0; failing < kDevices; ++failing) {
    joint_.vmms[failing]->FailAt(Verb::kCreate, 0);
    std::vector<bool> ok;
    joint_.joint->EnterHost();
    OnEach([&](int i) { ok.push_back(swap->StartRead(i).status.ok()); });
    joint_.joint->LeaveHost();
    OnEach([&](int i) { EXPECT_EQ(ok[i], i != failing); });
    EXPECT_EQ(io_->reads, 0);
    AsHost([&](int i) { swap->CancelRead(i); });
    joint_.vmms[failing]->FailAt(Verb::kNone, -1);
    EXPECT_TRUE(swap->stored());
    EXPECT_EQ(pool(0)->Numbers().blocks_swapped, 0);
    ExpectEqual();
    OnEach([&](int i) {  // as the host does after calls that only some pools have made
      std::int64_t freed = 0;
      EXPECT_OK(pool(i)->Trim(&freed));
    });
  }
  ToMemory(swap.get());
  ExpectStamped(In(swap.get()), 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, MappingsThatFailOnOneDevice) {
  const auto swap = OutToDisk(Begin(40, 1));
  ToMemory(swap.get());
  for (int failing = 0; failing < kDevices; ++failing) {
    joint_.vmms[failing]->FailAt(Verb::kMap, 0);
    std::vector<Claim> claims;
    AsHost([&](int i) { claims.push_back(pool(i)->SwapIn(swap->parts()[i])); });
    joint_.vmms[failing]->FailAt(Verb::kNone, -1);
    AsHost([&](int i) {
      EXPECT_EQ(claims[i].status.ok(), i != failing);
      if (claims[i].status.ok()) pool(i)->UndoSwapIn(swap->parts()[i], claims[i].slots[0]);
    });
    EXPECT_EQ(StateOf(*swap), SwapState::kMemory);
    ExpectEqual();
  }
  ExpectStamped(In(swap.get()), 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, GivenUpInAnyState) {
  const auto queued = StartOut(Begin(20, 1));
  queued->Drop();
  EXPECT_TRUE(queued->gone());
  ExpectEqual();
  Vacate(queued->parts()[0]->slot);
  io_->held_write = io_->writes + 1;
  const auto writing = Out(Begin(40, 1));
  EXPECT_TRUE(Soon([&] { return io_->writes == io_->held_write + 1; }));
  joint_.joint->EnterHost();
  writing->Drop();
  EXPECT_EQ(StateOf(*writing), SwapState::kWriting);  // not before the end of the host call
  EXPECT_TRUE(writing->gone());
  joint_.joint->LeaveHost();
  EXPECT_EQ(StateOf(*writing), SwapState::kGone);
  EXPECT_EQ(pool(0)->Numbers().sequences_swapped, 0);
  ExpectEqual();
  io_->held_write = -1;
  EXPECT_TRUE(Soon([&] { return pool(2)->SwapWrites() == 0; }));
  const auto stored = OutToDisk(Begin(40, 1));
  stored->Drop();
  EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
  const auto reading = OutToDisk(Begin(40, 1));
  io_->held_read = io_->reads + 1;
  Prefetch(reading.get());
  EXPECT_TRUE(Soon([&] { return io_->reads == io_->held_read + 1; }));
  reading->Drop();
  io_->held_read = -1;
  EXPECT_TRUE(Soon([&] { return StateOf(*reading) == SwapState::kGone; }));
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, ANewGenerationTakesWhatNotAllHaveReleased) {
  const std::int32_t slot = Begin(40, 1);
  const auto swap = StartOut(slot);
  EXPECT_OK(program(1)->Vacate(slot));
  EXPECT_EQ(StateOf(*swap), SwapState::kQueued);
  joint_.Restart();
  EXPECT_TRUE(Soon([&] { return swap->stored(); }));
  EXPECT_EQ(swap->tokens(), 40);
  ExpectEqual();
  ToMemory(swap.get());
  ExpectStamped(In(swap.get()), 0, 40, 1);
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, TheStoreClosesFirst) {
  io_->held_write = 1;
  const auto writing = Out(Begin(20, 1));
  const auto queued = StartOut(Begin(30, 2));
  io_->held_write = -1;
  store_->Close();
  Vacate(queued->parts()[0]->slot);
  EXPECT_EQ(StateOf(*queued), SwapState::kMemory);
  ExpectStamped(In(queued.get()), 0, 30, 2);
  EXPECT_TRUE(Soon([&] { return pool(0)->SwapWrites() == 0; }));
  writing->Drop();
  ExpectNothingLeft();
}

TEST_P(JointSwapFaultsTest, ThePoolsCloseFirst) {
  const auto stored = OutToDisk(Begin(20, 1));
  io_->held_write = io_->writes + 1;
  const auto writing = Out(Begin(20, 1));
  EXPECT_TRUE(Soon([&] { return io_->writes == io_->held_write + 1; }));
  OnEach([&](int i) { pool(i)->Close(); });
  EXPECT_TRUE(stored->gone());
  EXPECT_TRUE(writing->gone());
  EXPECT_EQ(stored->StartRead(1).status.reason(), Reason::kClosed);
  joint_.programs.clear();
  joint_.pools.clear();
  io_->held_write = -1;
  EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
  writing->Drop();
}

INSTANTIATE_TEST_SUITE_P(All, JointSwapFaultsTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
