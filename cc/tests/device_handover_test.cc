// Sequences handed over between pools on a device, with the kernels (on the emulated device) and the handles of the
// fake driver: what programs may still do with sent blocks, who waits, and what remains after driver failures.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/device_swapping_util.h"

namespace kvpage::testing {
namespace {

using handover::HandoverPtr;

class Rig : public SwappingRig {
 public:
  Rig(Layout layout, const std::shared_ptr<Machine>& machine, std::int32_t id) : SwappingRig(layout, machine, id) {}

  std::int32_t BeginHandover(std::int32_t tokens, float stamp, std::int64_t room = 64) {
    const Claim claim = pool().AcquireHandover({room});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    Edit(DeviceOp::kAcquire, {static_cast<std::int32_t>(SlotOpcode::kOccupy), claim.slots[0], 0});
    Write(claim.slots[0], tokens, stamp);
    return claim.slots[0];
  }
  HandoverPtr Export(std::int32_t slot) {
    HandoverPtr out;
    EXPECT_OK(pool().ExportBlocks(slot, "", {}, &out));
    return out;
  }
  std::int32_t Import(const handover::Handover& sent) {
    const Claim claim = pool().ImportBlocks(sent, "");
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    RunIn(claim);
    return claim.slots[0];
  }
  void Truncate(std::int32_t slot, std::int32_t tokens) {
    EXPECT_OK(pool().Truncate({slot}, {tokens}).status);
    Edit(DeviceOp::kTruncate, {static_cast<std::int32_t>(SlotOpcode::kTruncate), slot, tokens});
  }
  void Release(std::int32_t slot) {
    EXPECT_OK(StartRelease(pool(), {slot}));
    Edit(DeviceOp::kRelease, {static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
    std::int64_t freed = 0;
    EXPECT_OK(pool().Trim(&freed));
  }
};

class DeviceHandoverTest : public ::testing::TestWithParam<Layout> {
 protected:
  std::shared_ptr<Machine> machine_ = std::make_shared<Machine>();
  FakeDriver& fake() { return machine_->fake(); }
};
INSTANTIATE_TEST_SUITE_P(Layouts, DeviceHandoverTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(DeviceHandoverTest, KernelsGoOnBehindWhatWasReceived) {
  for (const bool owned : {true, false}) {
    Rig sender(GetParam(), machine_, 300), receiver(GetParam(), machine_, 301);
    const std::int32_t slot = owned ? sender.BeginHandover(40, 1) : sender.Begin(40, 1);
    const std::vector<char> before = sender.Bytes(slot, 40);
    const std::int64_t copies = fake().calls(cu::Call::kMemcpyDtoDAsync);
    const HandoverPtr sent = sender.Export(slot);
    ASSERT_NE(sent, nullptr);
    EXPECT_EQ(sent->copied, owned ? 0 : 3 * sender.logical_bytes());
    EXPECT_EQ(fake().calls(cu::Call::kMemcpyDtoDAsync) - copies, owned ? 0 : 2 * sender.ranges());
    const std::int32_t back = receiver.Import(*sent);
    EXPECT_EQ(receiver.length(back), 40);
    EXPECT_EQ(receiver.Bytes(back, 40), before);
    EXPECT_OK(receiver.pool().Extend({back}, {70}).status);
    receiver.Write(back, 30, 2);
    EXPECT_OK(receiver.pool().TakeFault());
    EXPECT_EQ(receiver.length(back), 70);
    EXPECT_EQ(receiver.Bytes(back, 40), before);
    EXPECT_EQ(sender.Bytes(slot, 40), before);
    // Into a full block, which the receiver copies before it writes there.
    receiver.Truncate(back, 10);
    EXPECT_OK(receiver.pool().Extend({back}, {20}).status);
    receiver.Write(back, 10, 3);
    EXPECT_OK(receiver.pool().TakeFault());
    EXPECT_EQ(sender.Bytes(slot, 40), before);
    EXPECT_TRUE(sender.Adds());
    EXPECT_TRUE(receiver.Adds());
    receiver.Release(back);
    EXPECT_EQ(fake().Report().imported, 0);
  }
}

TEST_P(DeviceHandoverTest, TheSendersProgramsMayReadWhatTheyHaveSentAndNotWriteIt) {
  Rig sender(GetParam(), machine_, 300);
  const std::int32_t slot = sender.BeginHandover(40, 1);
  const std::vector<char> before = sender.Bytes(slot, 40);
  const HandoverPtr sent = sender.Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(machine_->Find(300)->slots[slot].shared, 48);
  EXPECT_EQ(machine_->Find(300)->slots[slot].room, 48);
  sender.Write(slot, 1, 9, /*commit=*/false);
  const Status refused = sender.pool().TakeFault();
  EXPECT_TRUE(Mentions(refused, "share")) << refused.message();
  EXPECT_EQ(sender.Bytes(slot, 40), before);
  sender.Restart();
  EXPECT_EQ(sender.length(slot), 40);
  sender.Truncate(slot, 40);
  EXPECT_OK(sender.pool().Extend({slot}, {60}).status);
  sender.Write(slot, 20, 2);
  EXPECT_OK(sender.pool().TakeFault());
  EXPECT_EQ(sender.length(slot), 60);
  EXPECT_EQ(sender.Bytes(slot, 40), before);
  EXPECT_TRUE(sender.Adds());
  // Not all of its blocks can be sent any more, so they are copied.
  const HandoverPtr again = sender.Export(slot);
  ASSERT_NE(again, nullptr);
  EXPECT_EQ(again->copied, 4 * sender.logical_bytes());
}

TEST_P(DeviceHandoverTest, WhatIsNotWrittenOrNotCommittedIsNotSent) {
  Rig sender(GetParam(), machine_, 300);
  for (const bool owned : {true, false}) {
    const std::int32_t slot = owned ? sender.BeginHandover(20, 1) : sender.Begin(20, 1);
    EXPECT_OK(sender.pool().Extend({slot}, {30}).status);
    EXPECT_OK(sender.pool().Commit(slot, {1, 2, 3}));
    HandoverPtr out;
    const Status early = sender.pool().ExportBlocks(slot, "", {}, &out);
    EXPECT_TRUE(Mentions(early, "23 tokens are committed, 20 are written in every layer")) << early.message();
    sender.Write(slot, 5, 2, /*commit=*/false);
    EXPECT_OK(sender.pool().TakeFault());
    const Status more = sender.pool().ExportBlocks(slot, "", {}, &out);
    EXPECT_EQ(more.ok(), !owned);
    EXPECT_TRUE(!owned || Mentions(more, "25 tokens, of which 23 are committed")) << more.message();
    // The slot can still be used.
    EXPECT_OK(sender.pool().Commit(slot, {4, 5}));
    sender.Write(slot, 5, 3);
    EXPECT_OK(sender.pool().TakeFault());
    EXPECT_EQ(sender.length(slot), 30);
    EXPECT_NE(sender.Export(slot), nullptr);
    EXPECT_TRUE(sender.Adds());
  }
}

TEST_P(DeviceHandoverTest, SealingWaitsForProgramsThatRun) {
  Rig sender(GetParam(), machine_, 300);
  const std::int32_t slot = sender.BeginHandover(40, 1);
  DevicePool* const entry = machine_->Find(300);
  __atomic_add_fetch(&entry->readers, 1, __ATOMIC_SEQ_CST);  // a program that has passed its check
  std::atomic<bool> done{false};
  HandoverPtr sent;
  std::thread exporter([&] {
    EXPECT_OK(sender.pool().ExportBlocks(slot, "", {}, &sent));
    done = true;
  });
  EXPECT_TRUE(Becomes(entry->slots[slot].room, 0));
  Pause();
  EXPECT_FALSE(done);
  __atomic_sub_fetch(&entry->readers, 1, __ATOMIC_SEQ_CST);
  exporter.join();
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(entry->slots[slot].room, 48);
}

TEST_P(DeviceHandoverTest, AForkReadsOnAndItsBlocksAreSentUncopied) {
  Rig sender(GetParam(), machine_, 300), receiver(GetParam(), machine_, 301);
  const std::int32_t slot = sender.BeginHandover(40, 1), fork = sender.Fork(slot);
  const std::vector<char> before = sender.Bytes(slot, 40);
  const HandoverPtr sent = sender.Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(sent->copied, 0);
  sender.Release(slot);
  EXPECT_OK(sender.pool().Extend({fork}, {50}).status);
  sender.Write(fork, 10, 4);
  EXPECT_OK(sender.pool().TakeFault());
  const std::vector<char> shared(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(before.size() * 32 / 40));
  EXPECT_EQ(sender.Bytes(fork, 32), shared);
  EXPECT_EQ(receiver.Bytes(receiver.Import(*sent), 40), before);
  EXPECT_TRUE(sender.Adds());
}

TEST_P(DeviceHandoverTest, WhatWasReceivedIsSwappedAsAnythingElse) {
  Rig sender(GetParam(), machine_, 300), receiver(GetParam(), machine_, 301);
  const std::int32_t slot = sender.BeginHandover(40, 1);
  const std::vector<char> before = sender.Bytes(slot, 40);
  const HandoverPtr sent = sender.Export(slot);
  ASSERT_NE(sent, nullptr);
  for (Rig* const rig : {&sender, &receiver}) {
    const std::int32_t there = rig == &sender ? slot : rig->Import(*sent);
    const SwapPtr swap = rig->OutToStore(there);
    EXPECT_EQ(fake().Report().imported, 0);
    const std::int32_t back = rig->In(swap);
    EXPECT_EQ(rig->Bytes(back, 40), before);
    EXPECT_OK(rig->pool().Extend({back}, {50}).status);
    rig->Write(back, 10, 2);  // in private memory by now
    EXPECT_OK(rig->pool().TakeFault());
    EXPECT_TRUE(rig->NothingLeft());
  }
}

// Fails the n-th driver call, whichever it is: what programs may do is unchanged, and a retry succeeds.
TEST_P(DeviceHandoverTest, AFaultAtEveryCall) {
  machine_ = nullptr;  // there can be only one fake driver
  int failures = 0, n = 1;
  for (bool struck = true; struck && n < 600; ++n) {
    const auto machine = std::make_shared<Machine>();
    Rig sender(GetParam(), machine, 300), receiver(GetParam(), machine, 301);
    FakeDriver& fake = machine->fake();
    sender.Begin(20, 5);  // the pool's first block determines whether the driver shares memory
    const std::int64_t faults = fake.faults();
    const auto twice = [&](const auto& call) {
      Status status = call();
      if (status.ok()) return;
      ++failures;
      EXPECT_TRUE(sender.Adds()) << n << ": " << status.message();
      EXPECT_TRUE(receiver.Adds()) << n << ": " << status.message();
      EXPECT_OK(call()) << n;
    };
    fake.FailAtAny(n, cu::Result::kUnknown);
    Claim claim;
    twice([&] { return (claim = sender.pool().AcquireHandover({64})).status; });
    ASSERT_FALSE(claim.slots.empty()) << n;
    const std::int32_t slot = claim.slots[0];
    sender.Edit(DeviceOp::kAcquire, {static_cast<std::int32_t>(SlotOpcode::kOccupy), slot, 0});
    sender.Write(slot, 40, 1);
    HandoverPtr sent;
    Status status = sender.pool().ExportBlocks(slot, "", {}, &sent);
    if (!status.ok()) {
      ++failures;
      EXPECT_EQ(machine->Find(300)->slots[slot].shared, 0) << n << ": " << status.message();
      EXPECT_EQ(machine->Find(300)->slots[slot].room, 64) << n << ": " << status.message();
      sender.Write(slot, 10, 2);  // its programs may still write
      EXPECT_OK(sender.pool().TakeFault());
      EXPECT_TRUE(sender.Adds()) << n << ": " << status.message();
      sent = sender.Export(slot);
    }
    ASSERT_NE(sent, nullptr) << n;
    EXPECT_EQ(sent->copied, 0) << n;
    const std::int64_t tokens = sent->header.tokens;
    const std::vector<char> before = sender.Bytes(slot, tokens);
    twice([&] { return (claim = receiver.pool().ImportBlocks(*sent, "")).status; });
    ASSERT_FALSE(claim.slots.empty()) << n;
    struck = fake.faults() > faults;
    fake.ClearFaults();
    receiver.RunIn(claim);
    EXPECT_EQ(receiver.Bytes(claim.slots[0], tokens), before) << n;
    EXPECT_OK(receiver.pool().Extend({claim.slots[0]}, {70}).status);
    receiver.Write(claim.slots[0], 10, 2);
    EXPECT_OK(receiver.pool().TakeFault());
    receiver.Release(claim.slots[0]);
    EXPECT_EQ(fake.Report().imported, 0) << n;
  }
  EXPECT_LT(n, 600);
  EXPECT_GT(failures, 20);
}

}  // namespace
}  // namespace kvpage::testing
