// Sequences of pools on a device that are swapped to host memory, with the kernels (on the emulated device) and the
// copies of the fake driver: what they hold, who waits, and what remains after driver failures.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/device_swapping_util.h"

namespace kvpage::testing {
namespace {

class DeviceSwappingTest : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, DeviceSwappingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(DeviceSwappingTest, ASequenceComesBackInAnotherSlot) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_EQ(rig.pool().Numbers().blocks_free, rig.pool().Numbers().blocks_total);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 3 * rig.logical_bytes());
  const Status early = rig.pool().SwapIn(swap).status;
  EXPECT_TRUE(Mentions(early, "is in host memory: pool.prefetch")) << early.message();
  const std::int32_t other = rig.Begin(100, 50);
  EXPECT_EQ(other, slot);
  const std::int32_t back = rig.In(swap);
  ASSERT_NE(back, slot);
  EXPECT_EQ(rig.length(back), 40);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  EXPECT_EQ(rig.pool().Committed(back).size(), 40u);
  // No bytes of another sequence follow its tokens.
  const std::vector<char> whole = rig.Bytes(back, 48);
  EXPECT_EQ(std::count(whole.begin() + static_cast<std::ptrdiff_t>(before.size()), whole.end(), '\0'),
            static_cast<std::ptrdiff_t>(whole.size() - before.size()));
  EXPECT_TRUE(rig.NothingLeft());
  // It can continue: there is room, and it may write all of it.
  EXPECT_OK(rig.pool().Extend({back}, {70}).status);
  rig.Write(back, 30, 2);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_EQ(rig.length(back), 70);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  // Buffers are kept for the next sequence.
  const std::int64_t pinned = rig.fake().calls(cu::Call::kMemHostAlloc);
  const SwapPtr again = rig.OutToStore(other);
  EXPECT_EQ(rig.fake().calls(cu::Call::kMemHostAlloc), pinned + 7 - 3);
  EXPECT_GE(rig.In(again), 0);
}

TEST_P(DeviceSwappingTest, NothingIsTakenBeforeTheReleaseHasRun) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(20, 1);
  EXPECT_OK(rig.pool().Extend({slot}, {24}).status);
  const SwapPtr swap = rig.StartOut(slot);
  Pause();
  EXPECT_EQ(swap->state(), SwapState::kQueued);
  EXPECT_EQ(rig.pool().SwapIn(swap).status.code(), Code::kFailedPrecondition);
  rig.Write(slot, 4, 3, /*commit=*/false);  // queued earlier, but not committed, so not kept
  const std::vector<char> before = rig.Bytes(slot, 20);
  rig.Vacate(slot);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(swap->tokens(), 20);
  const std::int32_t back = rig.In(swap);
  EXPECT_EQ(rig.length(back), 20);
  EXPECT_EQ(rig.Bytes(back, 20), before);
}

TEST_P(DeviceSwappingTest, SharedBlocksStayAndAreNotWritten) {
  SwappingRig rig(GetParam());
  const std::int32_t parent = rig.Begin(40, 1), child = rig.Fork(parent);
  EXPECT_OK(rig.pool().Extend({child}, {60}).status);
  rig.Write(child, 20, 5);
  const std::vector<char> before = rig.Bytes(child, 52);
  const SwapPtr swap = rig.OutToStore(child);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 2 * rig.logical_bytes());
  EXPECT_EQ(rig.pool().Numbers().blocks_swapped, 2 * rig.ranges());
  const Claim claim = [&] {
    EXPECT_OK(rig.pool().Prefetch(swap).status);
    EXPECT_TRUE(swap->Wait(20));
    return rig.pool().SwapIn(swap);
  }();
  ASSERT_OK(claim.status);
  EXPECT_EQ(claim.shared[0], 32);
  rig.RunIn(claim);
  EXPECT_EQ(rig.Bytes(claim.slots[0], 52), before);
  EXPECT_EQ(rig.machine().Find(300)->slots[claim.slots[0]].shared, 32);
  rig.Edit(DeviceOp::kSetLengths, {static_cast<std::int32_t>(SlotOpcode::kSetLength), claim.slots[0], 40});
  rig.Write(claim.slots[0], 2, 9, /*commit=*/false);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_TRUE(rig.NothingLeft());
}

TEST_P(DeviceSwappingTest, AFullStoreLeavesSequencesInMemory) {
  SwappingRig rig(GetParam(), /*store_blocks=*/4);
  const std::int32_t first = rig.Begin(40, 1), second = rig.Begin(30, 2);
  const std::vector<char> before = rig.Bytes(second, 30);
  const SwapPtr stored = rig.OutToStore(first);
  const SwapPtr refused = rig.Out(second);
  EXPECT_TRUE(Soon([&] { return refused->state() == SwapState::kMemory; }));
  EXPECT_EQ(rig.store().Numbers().refused_writes, 1);
  EXPECT_NE(rig.store().Numbers().last_error.find("do not fit in a store of"), std::string::npos);
  EXPECT_EQ(rig.pool().Numbers().blocks_swapped, 2 * rig.ranges());
  EXPECT_EQ(rig.Bytes(rig.In(refused), 30), before);
  rig.pool().DropSwapped(stored);
  EXPECT_TRUE(rig.NothingLeft());
  EXPECT_LE(rig.store().Numbers().pinned_bytes, 4 * rig.logical_bytes());
}

// A slot that the host has swapped in keeps its sequence, even if the queued program never runs.
TEST_P(DeviceSwappingTest, ANewGenerationKeepsWhatWasSwappedIn) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_OK(rig.pool().Prefetch(swap).status);
  EXPECT_TRUE(swap->Wait(20));
  const Claim claim = rig.pool().SwapIn(swap);
  ASSERT_OK(claim.status);
  rig.Restart();
  const std::int32_t back = claim.slots[0];
  EXPECT_EQ(rig.length(back), 40);
  EXPECT_EQ(rig.Bytes(back, 40), before);
  EXPECT_OK(rig.pool().Extend({back}, {50}).status);
  rig.Write(back, 10, 3);
  EXPECT_OK(rig.pool().TakeFault());
  EXPECT_EQ(rig.length(back), 50);
  EXPECT_TRUE(rig.NothingLeft());
}

// A release never runs because a new generation begins: the sequence is swapped out then.
TEST_P(DeviceSwappingTest, ANewGenerationEndsTheWaitForARelease) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.StartOut(slot);
  rig.Restart();
  EXPECT_EQ(rig.length(slot), -1);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  EXPECT_TRUE(rig.NothingLeft());
}

TEST_P(DeviceSwappingTest, UndoneAndGivenUp) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  // The release could not be queued: nothing has happened.
  const SwapPtr undone = rig.StartOut(slot);
  rig.pool().UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0}});
  EXPECT_EQ(undone->state(), SwapState::kGone);
  EXPECT_EQ(rig.Bytes(slot, 40), before);
  // The program that occupies the slot could not be queued: the sequence is swapped out again, without a copy.
  const SwapPtr swap = rig.OutToStore(slot);
  EXPECT_OK(rig.pool().Prefetch(swap).status);
  EXPECT_TRUE(swap->Wait(20));
  const Claim claim = rig.pool().SwapIn(swap);
  rig.pool().UndoSwapIn(swap, claim.slots[0]);
  EXPECT_EQ(swap->state(), SwapState::kMemory);
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  const SwapPtr dropped = rig.OutToStore(slot);
  rig.pool().DropSwapped(dropped);
  EXPECT_TRUE(rig.NothingLeft());
  EXPECT_EQ(rig.pool().Numbers().blocks_free, rig.pool().Numbers().blocks_total);
}

TEST_P(DeviceSwappingTest, TheStoreOrThePoolEndsFirst) {
  {
    SwappingRig rig(GetParam());
    const SwapPtr stored = rig.OutToStore(rig.Begin(40, 1));
    const std::int32_t slot = rig.Begin(30, 2);
    const std::vector<char> before = rig.Bytes(slot, 30);
    const SwapPtr queued = rig.StartOut(slot);
    rig.store().Close();
    rig.Vacate(slot);
    EXPECT_EQ(queued->state(), SwapState::kQueued) << "nobody polls";
    EXPECT_EQ(rig.Bytes(rig.In(queued), 30), before);  // it never left memory
    EXPECT_OK(rig.pool().Prefetch(stored).status);
    EXPECT_TRUE(Mentions(rig.pool().SwapIn(stored).status, "(closed); it keeps the copy"));
    SwapPtr refused;
    EXPECT_EQ(rig.pool().SwapOut(0, rig.store_ptr(), &refused).reason(), Reason::kClosed);
    rig.pool().DropSwapped(stored);
    EXPECT_TRUE(rig.NothingLeft());
  }
  SwappingRig rig(GetParam());
  const SwapPtr stored = rig.OutToStore(rig.Begin(40, 1));
  const SwapPtr queued = rig.StartOut(rig.Begin(30, 2));
  rig.pool().Close();
  EXPECT_EQ(stored->state(), SwapState::kGone);
  EXPECT_EQ(queued->state(), SwapState::kGone);
  EXPECT_EQ(rig.store().Numbers().used_bytes, 0);
}

// The store does not disturb the capture of a graph in another thread, in the capture mode that XLA uses.
TEST_P(DeviceSwappingTest, BesideACapture) {
  SwappingRig rig(GetParam());
  const std::int32_t slot = rig.Begin(40, 1);
  const std::vector<char> before = rig.Bytes(slot, 40);
  const SwapPtr swap = rig.StartOut(slot);
  const cu::Stream stream = rig.machine().NewStream();
  std::thread([&] { rig.fake().BeginCapture(stream, FakeDriver::CaptureMode::kThreadLocal); }).join();
  rig.Vacate(slot);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; })) << rig.store().Numbers().last_error;
  EXPECT_EQ(rig.Bytes(rig.In(swap), 40), before);
  EXPECT_NE(rig.fake().EndCapture(stream), nullptr) << rig.fake().Report().ToString();
}

// Fails the n-th driver call, whichever it is and whoever makes it.
TEST_P(DeviceSwappingTest, AFaultAtEveryCall) {
  int failures = 0, stayed = 0, reread = 0, n = 1;
  for (bool struck = true; struck && n < 400; ++n) {
    SwappingRig rig(GetParam());
    const std::int32_t slot = rig.Begin(40, 1);
    const std::vector<char> before = rig.Bytes(slot, 40);
    const std::int64_t faults = rig.fake().faults();
    rig.fake().FailAtAny(n, cu::Result::kUnknown);
    const auto twice = [&](const auto& call) {
      Status status = call();
      if (status.ok()) return;
      ++failures;
      EXPECT_TRUE(rig.Adds()) << n << ": " << status.message();
      status = call();
      EXPECT_OK(status) << n;
    };
    SwapPtr swap;
    twice([&] { return rig.pool().SwapOut(slot, rig.store_ptr(), &swap); });
    rig.Vacate(slot);
    const auto settled = [&] { return swap->state() == SwapState::kStored || swap->state() == SwapState::kMemory; };
    EXPECT_TRUE(Soon(settled)) << n;
    if (swap->state() == SwapState::kMemory) {
      ++stayed;
      EXPECT_EQ(rig.store().Numbers().failed_writes, 1) << n;
    }
    EXPECT_TRUE(rig.Adds()) << n;
    twice([&]() -> Status {
      KVPAGE_RETURN_IF_ERROR(rig.pool().Prefetch(swap).status);
      EXPECT_TRUE(swap->Wait(20)) << n;
      if (swap->state() == SwapState::kMemory) return {};
      ++reread;
      return FailedPrecondition(swap->error());
    });
    Claim claim;
    twice([&] { return (claim = rig.pool().SwapIn(swap)).status; });
    ASSERT_FALSE(claim.slots.empty()) << n;
    rig.RunIn(claim);
    EXPECT_EQ(rig.length(claim.slots[0]), 40) << n;
    EXPECT_EQ(rig.Bytes(claim.slots[0], 40), before) << n;
    struck = rig.fake().faults() > faults;
    rig.fake().ClearFaults();
    EXPECT_OK(rig.pool().Extend({claim.slots[0]}, {60}).status);
    rig.Write(claim.slots[0], 20, 2);
    EXPECT_OK(rig.pool().TakeFault());
    EXPECT_TRUE(rig.NothingLeft()) << n;
  }
  EXPECT_LT(n, 400);
  EXPECT_GT(failures, 5);
  EXPECT_GT(stayed, 3) << "buffers and copies to the host";
  EXPECT_GT(reread, 1) << "copies back";
}

}  // namespace
}  // namespace kvpage::testing
