// What slots share, as programs on a device see it: set by forks, and cut before mappings change.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

using Blocks = std::vector<std::int32_t>;

class DeviceRunsTest : public ::testing::Test {
 protected:
  DeviceRunsTest() {
    program_.Restart(pool_.get());
    donor_ = Acquire(pool_.get(), &program_, 64);
    program_.Write(donor_, 64);
    EXPECT_OK(pool_->Commit(donor_, Blocks(64, 7)));
  }
  const DevicePool& entry() { return *machine_.Find(7); }
  std::int32_t Fork(std::int32_t donor, std::int64_t tokens) {
    const Claim claim = pool_->Fork("fork", {{donor, tokens}}, {});
    EXPECT_OK(claim.status);
    return claim.status.ok() ? claim.slots[0] : -1;
  }
  // Returns the run on the device.
  Blocks Run(std::int32_t slot) {
    const DeviceRuns& runs = entry().runs;
    if (runs.blocks == nullptr) return {};
    const std::int32_t* const begin = runs.blocks + slot * runs.width;
    return {begin, begin + runs.counts[slot]};
  }

  Machine machine_;
  const std::shared_ptr<Pool> pool_ = machine_.MakePool(7, 64);
  DeviceProgram program_{&machine_, 7};
  std::int32_t donor_ = -1;
};

TEST_F(DeviceRunsTest, ForksAndTruncations) {
  EXPECT_EQ(entry().runs.blocks, nullptr) << "nothing is shared, and there is no memory for it";
  const std::int32_t a = Fork(donor_, 64), b = Fork(donor_, 40);
  const Blocks all = Run(donor_);
  EXPECT_EQ(all.size(), 4U);
  EXPECT_EQ(Run(a), all);
  EXPECT_EQ(Run(b), Blocks(all.begin(), all.begin() + 2)) << "whole blocks";
  EXPECT_EQ(entry().run_cuts, 0U);

  EXPECT_OK(pool_->Truncate({donor_}, {20}).status);
  EXPECT_EQ(Run(donor_), Blocks(all.begin(), all.begin() + 1));
  EXPECT_EQ(Run(a), all);
  EXPECT_EQ(entry().run_cuts, 1U);
}

// Earlier plans must not be trusted any more, and nothing may change while the device cannot be told.
TEST_F(DeviceRunsTest, NoMappingChangesBeforeItsRunIsCut) {
  const std::int32_t fork = Fork(donor_, 64);
  const Blocks all = Run(donor_);
  const std::int64_t shared = pool_->Numbers().blocks_shared;
  machine_.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 1, cu::Result::kUnknown);
  EXPECT_FALSE(pool_->Truncate({donor_}, {20}).status.ok());
  machine_.fake().ClearFaults();
  EXPECT_EQ(pool_->Numbers().blocks_shared, shared);
  EXPECT_EQ(Run(donor_), all);
  EXPECT_OK(pool_->Truncate({donor_}, {20}).status);
  EXPECT_EQ(Run(donor_).size(), 1U);
  EXPECT_EQ(Run(fork), all);
}

// A fork that the device is not told of still shares its blocks; only speed is lost.
TEST_F(DeviceRunsTest, AForkThatIsNotTold) {
  for (int call = 1; call <= 4; ++call) {
    machine_.fake().FailAt(cu::Call::kMemcpyHtoDAsync, call, cu::Result::kUnknown);
    const Claim claim = pool_->Fork("fork", {{donor_, 64}}, {});
    machine_.fake().ClearFaults();
    if (!claim.status.ok()) continue;  // the copy with its room has failed
    const Blocks run = Run(claim.slots[0]), other = Run(donor_);
    EXPECT_TRUE(run.empty() || run.size() == 4) << call;
    EXPECT_TRUE(run.empty() || other.empty() || run == other) << call;
    break;
  }
}

// Kernels that run meanwhile must never find the blocks without their counts.
TEST_F(DeviceRunsTest, ThePointerToTheBlocksArrivesLast) {
  bool counts_alone = false;
  for (int call = 1; call <= 6 && entry().runs.blocks == nullptr; ++call) {
    machine_.fake().FailAt(cu::Call::kMemcpyHtoDAsync, call, cu::Result::kUnknown, 100);
    static_cast<void>(pool_->Fork("fork", {{donor_, 64}}, {}));
    machine_.fake().ClearFaults();
    const DeviceRuns& runs = entry().runs;
    counts_alone |= runs.blocks == nullptr && runs.counts != nullptr && runs.width > 0;
  }
  EXPECT_TRUE(counts_alone);
  EXPECT_NE(entry().runs.blocks, nullptr);
}

TEST_F(DeviceRunsTest, ALongerForkExtendsTheRun) {
  const std::int32_t a = Fork(donor_, 40), b = Fork(donor_, 64);
  const Blocks all = Run(b);
  EXPECT_EQ(all.size(), 4U);
  EXPECT_EQ(Run(donor_), all);
  EXPECT_EQ(Run(a), Blocks(all.begin(), all.begin() + 2));
}

// Blocks after those that the device was not told of would leave a gap.
TEST_F(DeviceRunsTest, NothingFollowsWhatWasNotTold) {
  Claim claim;
  for (int call = 1; call <= 4; ++call) {
    machine_.fake().FailAt(cu::Call::kMemcpyHtoDAsync, call, cu::Result::kUnknown);
    claim = pool_->Fork("fork", {{donor_, 40}}, {});
    machine_.fake().ClearFaults();
    if (claim.status.ok()) break;
  }
  ASSERT_OK(claim.status);
  const Blocks all = Run(Fork(donor_, 64));
  EXPECT_EQ(all.size(), 4U);
  for (const std::int32_t slot : {donor_, claim.slots[0]}) {
    const Blocks run = Run(slot);
    EXPECT_TRUE(run.size() <= 4 && std::equal(run.begin(), run.end(), all.begin())) << slot;
  }
}

// A slot with a hole is in no group: its run is cut before its memory is unmapped.
TEST_F(DeviceRunsTest, ADroppedBeginningIsCutBeforeItIsUnmapped) {
  const std::int32_t fork = Fork(donor_, 64);
  const Blocks all = Run(donor_);
  const CacheRef cache = {entry().generation, program_.epoch()};
  std::vector<std::int64_t> dropped;
  // Fail all copies from the second one on, after the one with the number of dropped tokens.
  machine_.fake().FailAt(cu::Call::kMemcpyHtoDAsync, 2, cu::Result::kUnknown, /*times=*/1000);
  EXPECT_OK(pool_->DropBefore({donor_}, {32}, &dropped, cache));
  EXPECT_EQ(Run(donor_), all);
  EXPECT_EQ(pool_->Numbers().blocks_shared, 4) << "the device does not know, so nothing is unmapped";
  machine_.fake().ClearFaults();
  EXPECT_EQ(pool_->Numbers().blocks_shared, 2) << "the next call tries again";
  EXPECT_TRUE(Run(donor_).empty());
  EXPECT_EQ(Run(fork), all);
}

// If nothing is shared, programs queued now need no launch for groups, but captured ones run later.
TEST_F(DeviceRunsTest, TheHostKnowsWhetherThereAreRuns) {
  const DeviceState& device = *machine_.device();
  const cu::Stream stream = machine_.NewStream();
  const auto may_find_runs = [&] {
    const ContextScope scope(*device.context());
    return device.MayFindRuns(stream);
  };
  EXPECT_FALSE(may_find_runs());
  machine_.fake().BeginCapture(stream, FakeDriver::CaptureMode::kThreadLocal);
  EXPECT_TRUE(may_find_runs());
  EXPECT_NE(machine_.fake().EndCapture(stream), nullptr);
  Fork(donor_, 64);
  EXPECT_TRUE(may_find_runs());
  EXPECT_OK(pool_->Truncate({donor_}, {0}).status);
  EXPECT_FALSE(may_find_runs()) << "the fork shares with nobody";
}

TEST_F(DeviceRunsTest, AReleasedSlotIsCutBeforeItsBlocksGoToOthers) {
  const std::int32_t fork = Fork(donor_, 64);
  program_.Restart(pool_.get());  // the fork's program never ran, so the slot is free
  EXPECT_EQ(program_.length(fork), -1);
  // Take every slot and block.
  for (int i = 0; i < kSlots - 1; ++i) Acquire(pool_.get(), &program_, 64);
  EXPECT_TRUE(Run(fork).empty());
  EXPECT_GT(entry().run_cuts, 0U);
}

}  // namespace
}  // namespace kvpage::testing
