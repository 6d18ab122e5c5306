// Sequences handed over between pools: failures at every step, handlers that run meanwhile, undo, generations.
#include "cache/handover.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/swapping_util.h"

namespace kvpage::testing {
namespace {

class HandoverTest : public SwappingTest {
 protected:
  // Starts a sequence whose slot keeps its blocks in a separate file and has room for more tokens.
  std::int32_t BeginInFile(std::int32_t tokens, float stamp, std::int64_t room) {
    const Claim claim = pool_->AcquireHandover({room});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(program_->Occupy(claim.slots[0]));
    WriteStamped(pool_.get(), program_.get(), claim.slots[0], tokens, stamp);
    return claim.slots[0];
  }
  handover::HandoverPtr Export(std::int32_t slot) {
    handover::HandoverPtr out;
    EXPECT_OK(pool_->ExportBlocks(slot, "", {}, &out));
    return out;
  }
  std::int64_t free_blocks() { return pool_->Numbers().blocks_free; }
};

TEST_P(HandoverTest, AReceivedSequenceIsReadWhereItIs) {
  const std::int32_t slot = Begin(40, 1);
  const handover::HandoverPtr sent = Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(sent->copied, 3 * ranges() * geometry_.block_bytes);
  handover::HandoverPtr received;
  ASSERT_OK(handover::Receive({sent->file->fd()}, &received));
  const Claim claim = pool_->ImportBlocks(*received, "");
  ASSERT_OK(claim.status);
  ASSERT_OK(RunIn(claim));
  const std::int32_t back = claim.slots[0];
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  ForTokens(pool_.get(), back, 40, 48, [](float& at, float) { EXPECT_EQ(at, 0); });
  EXPECT_EQ(pool_->Numbers().blocks_received, 2 * ranges());
  EXPECT_EQ(pool_->Numbers().handovers.bytes_copied_in, ranges() * geometry_.block_bytes);
  WriteStamped(pool_.get(), program_.get(), back, 30, 1);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 70, 1), 70);
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 40, 1), 40);
  EXPECT_TRUE(AllRight());
  program_->Release(back);
  std::int64_t freed = 0;
  ASSERT_OK(pool_->Trim(&freed));
  EXPECT_EQ(pool_->Numbers().blocks_received, 0);
  EXPECT_TRUE(AllRight());
}

TEST_P(HandoverTest, ASlotWhoseFileCannotBeSealedGoesOn) {
  const std::int32_t slot = BeginInFile(40, 1, 64);
  for (const Verb verb : {Verb::kSeal, Verb::kMapReadOnly, Verb::kUnmap}) {
    for (int call = 0; call < (verb == Verb::kSeal ? 1 : ranges()); ++call) {
      const std::int64_t free = free_blocks();
      vmm_->FailAt(verb, call);
      handover::HandoverPtr out;
      EXPECT_EQ(pool_->ExportBlocks(slot, "", {}, &out).code(), Code::kResourceExhausted);
      EXPECT_TRUE(vmm_->failed());
      EXPECT_EQ(free_blocks(), free);
      EXPECT_TRUE(AllRight());
      EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 40, 1), 40);
    }
  }
  vmm_->FailAt(Verb::kNone, 0);
  WriteStamped(pool_.get(), program_.get(), slot, 10, 1);  // it may still write, and keeps its room
  const handover::HandoverPtr sent = Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(sent->copied, 0);
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 50, 1), 50);
  EXPECT_TRUE(Mentions(program_->Write(slot, 1), "share"));
  program_->Truncate(slot, 50);
  ASSERT_OK(program_->Write(slot, 1));
  EXPECT_TRUE(AllRight());
}

// By then its file has blocks of the fork, which the receiver of this sequence must not see.
TEST_P(HandoverTest, ASlotThatHasGivenBlocksToAForkIsCopied) {
  const std::int32_t slot = BeginInFile(40, 1, 40);
  const std::int32_t fork = program_->Fork(slot);
  program_->Truncate(slot, 16);
  const handover::HandoverPtr sent = Export(slot);
  ASSERT_NE(sent, nullptr);
  EXPECT_EQ(sent->copied, ranges() * geometry_.block_bytes);
  EXPECT_EQ(sent->header.file_bytes(), sent->file->bytes());
  program_->Truncate(fork, 20);
  ASSERT_OK(program_->Write(fork, 1));
  EXPECT_EQ(CountStamped(pool_.get(), fork, 0, 20, 1), 20);
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 16, 1), 16);
  EXPECT_TRUE(AllRight());
}

TEST_P(HandoverTest, AnImportThatFailsLeavesNothing) {
  const handover::HandoverPtr sent = Export(Begin(40, 1));
  ASSERT_NE(sent, nullptr);
  const std::int64_t free = free_blocks();
  int failures = 0;
  for (const Verb verb : {Verb::kLend, Verb::kMapReadOnly, Verb::kMap}) {
    for (int call = 0;; ++call) {
      vmm_->FailAt(verb, call);
      const Claim claim = pool_->ImportBlocks(*sent, "");
      if (!vmm_->failed()) {
        ASSERT_OK(claim.status);
        pool_->UndoImport(claim.slots[0]);
        break;
      }
      ++failures;
      EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
      EXPECT_EQ(free_blocks(), free);
      EXPECT_EQ(pool_->Numbers().slots_occupied, 1);
      EXPECT_EQ(pool_->Numbers().blocks_received, 0);
      EXPECT_TRUE(AllRight());
    }
    EXPECT_EQ(free_blocks(), free);
    EXPECT_EQ(pool_->Numbers().handovers.imported, 0);
  }
  EXPECT_EQ(failures, 1 + 2 * ranges());
}

TEST_P(HandoverTest, AnAcquisitionThatFailsLeavesNothing) {
  const std::int64_t free = free_blocks();
  for (const Verb verb : {Verb::kLend, Verb::kMap}) {
    vmm_->FailAt(verb, 1);  // for the second slot, or the second range
    const Claim claim = pool_->AcquireHandover({40, 20});
    EXPECT_TRUE(vmm_->failed());
    EXPECT_FALSE(claim.status.ok());
    EXPECT_TRUE(claim.slots.empty());
    EXPECT_EQ(free_blocks(), free);
    EXPECT_EQ(pool_->Numbers().slots_occupied, 0);
    EXPECT_TRUE(AllRight());
  }
}

TEST_P(HandoverTest, SealingWaitsForHandlersOfTheSlot) {
  const std::int32_t slot = BeginInFile(40, 1, 64);
  std::atomic<bool> done{false};
  std::thread exporter;
  {
    PinnedSlots running;  // an append that has written only one of two layers so far
    ASSERT_OK(program_->Begin(slot, 1, 0, /*append=*/true, &running));
    handover::HandoverPtr out;
    const Status refused = pool_->ExportBlocks(slot, "", [] { return false; }, &out);
    EXPECT_TRUE(Mentions(refused, "interrupted")) << refused.message();
    exporter = std::thread([&] {
      handover::HandoverPtr sent;
      EXPECT_OK(pool_->ExportBlocks(slot, "", {}, &sent));
      done = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_FALSE(done);
    ForTokens(pool_.get(), slot, 40, 41, [](float& at, float) { at = 3; });  // this write is still allowed
  }
  exporter.join();
  EXPECT_TRUE(done);
  EXPECT_TRUE(AllRight());
}

TEST_P(HandoverTest, AGenerationKeepsASequenceWhoseProgramHasNotRun) {
  const handover::HandoverPtr sent = Export(Begin(40, 1));
  const Claim claim = pool_->ImportBlocks(*sent, "");
  ASSERT_OK(claim.status);
  program_->Restart();
  EXPECT_EQ(program_->length(claim.slots[0]), 40);
  EXPECT_EQ(CountStamped(pool_.get(), claim.slots[0], 0, 40, 1), 40);
  EXPECT_TRUE(AllRight());
}

TEST_P(HandoverTest, ASealedSequenceIsSwappedAndComesBackReadOnly) {
  const std::int32_t slot = BeginInFile(40, 1, 64);
  const handover::HandoverPtr sent = Export(slot);
  ASSERT_NE(sent, nullptr);
  io_->write_error = 28;  // ENOSPC: it stays in memory
  const SwapPtr swap = Out(slot);
  ASSERT_TRUE(Soon([&] { return swap->state() == SwapState::kMemory; }));
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_TRUE(Mentions(program_->Write(back, 1), "share"));
  program_->Truncate(back, 40);
  ASSERT_OK(program_->Write(back, 1));
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_TRUE(AllRight());
}

INSTANTIATE_TEST_SUITE_P(Layouts, HandoverTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
