// Sequences that are swapped out and in: contents and accounts, also while they are written or read.
#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <vector>

#include "cache/relocation.h"
#include "tests/swapping_util.h"

namespace kvpage::testing {
namespace {

TEST_P(SwappingTest, ASequenceComesBackInAnotherSlot) {
  const std::int32_t slot = Begin(40, 1);
  const SwapPtr swap = OutToDisk(slot);
  EXPECT_EQ(pool_->Numbers().blocks_free, pool_->Numbers().blocks_total);
  EXPECT_EQ(pool_->Numbers().swaps.bytes_swapped_out, 3 * ranges() * geometry_.block_bytes);
  EXPECT_EQ(pool_->SwapIn(swap).status.code(), Code::kFailedPrecondition);
  const std::int32_t other = Begin(100, 2);
  EXPECT_EQ(other, slot);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  EXPECT_EQ(swap->tokens_in_memory(), 40);
  EXPECT_EQ(pool_->Numbers().blocks_swapped, 3 * ranges());
  const std::int32_t back = In(swap);
  EXPECT_NE(back, slot);
  EXPECT_EQ(program_->length(back), 40);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_EQ(pool_->Committed(back).size(), 40u);
  // No bytes of another sequence follow its tokens.
  ForTokens(pool_.get(), back, 40, 48, [](float& at, float) { EXPECT_EQ(at, 0); });
  WriteStamped(pool_.get(), program_.get(), back, 30, 1);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 70, 1), 70);
  EXPECT_EQ(CountStamped(pool_.get(), other, 0, 100, 2), 100);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, NothingIsTakenBeforeTheReleaseHasRun) {
  const std::int32_t slot = Begin(20, 1);
  const SwapPtr swap = StartOut(slot);
  EXPECT_EQ(swap->state(), SwapState::kQueued);
  EXPECT_EQ(pool_->SwapIn(swap).status.code(), Code::kFailedPrecondition);
  ASSERT_OK(program_->Write(slot, 4));  // queued earlier, but not committed, so not kept
  ASSERT_OK(program_->Vacate(slot));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(swap->tokens(), 20);
}

// The program passes the length of the sequence, but the host knows it.
TEST_P(SwappingTest, AProgramCannotMakeTheSequenceLonger) {
  const SwapPtr swap = Out(Begin(20, 1));
  const Claim claim = pool_->SwapIn(swap);
  ASSERT_OK(claim.status);
  Claim forged = claim;
  forged.tokens = {claim.tokens[0] + 1};
  const Status status = RunIn(forged);
  EXPECT_NE(status.message().find("was not swapped in with 21 tokens"), std::string::npos) << status.message();
  EXPECT_OK(RunIn(claim));
}

TEST_P(SwappingTest, TokensThatWereNeverWrittenAreNotKept) {
  const std::int32_t slot = Begin(20, 1);
  ASSERT_OK(pool_->Commit(slot, {7, 7, 7}));
  const SwapPtr swap = OutToDisk(slot);
  EXPECT_EQ(swap->tokens(), 20);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  EXPECT_EQ(pool_->Committed(In(swap)).size(), 20u);
}

// This also holds for a sequence that never left memory: no uncommitted tokens follow its own.
TEST_P(SwappingTest, WhatWasNotCommittedIsZeroAfterwards) {
  io_->write_error = ENOSPC;
  const std::int32_t slot = Begin(20, 1);
  const SwapPtr swap = StartOut(slot);
  ASSERT_OK(program_->Write(slot, 4));
  ForTokens(pool_.get(), slot, 20, 24, [](float& at, float) { at = 9; });
  ASSERT_OK(program_->Vacate(slot));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kMemory; }));
  const std::int32_t back = In(swap);
  ForTokens(pool_.get(), back, 20, 32, [](float& at, float) { EXPECT_EQ(at, 0); });
  // It may write all of its blocks.
  ASSERT_OK(program_->SetLength(back, 4));
  EXPECT_OK(program_->Write(back, 1));
}

// The sequence's last block also belongs to the prefix index, for which it must not change.
TEST_P(SwappingTest, ACachedPartialBlockIsNotWritten) {
  io_->write_error = ENOSPC;
  const std::vector<std::int32_t> ids(40, 7);
  const std::int32_t slot = program_->AcquirePrefix(ids).slots[0];
  WriteStamped(pool_.get(), program_.get(), slot, 40, 1);
  const SwapPtr swap = Out(slot);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kMemory; }));
  const std::int32_t back = In(swap);
  EXPECT_FALSE(program_->SetLength(back, 34).ok()) << "the host makes a copy first";
  program_->Truncate(back, 34);
  WriteStamped(pool_.get(), program_.get(), back, 6, 2);
  std::vector<std::int32_t> longer = ids;
  longer.push_back(8);
  const Claim claim = program_->AcquirePrefix(longer);
  ASSERT_OK(claim.status);
  EXPECT_EQ(claim.tokens[0], 40);
  EXPECT_EQ(CountStamped(pool_.get(), claim.slots[0], 0, 40, 1), 40);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 34, 1), 34);
  EXPECT_EQ(CountStamped(pool_.get(), back, 34, 40, 2), 6);
  EXPECT_OK(pool_->Audit());
}

TEST_P(SwappingTest, ASequenceWithoutTokens) {
  const SwapPtr swap = Out(program_->Acquire(30));
  EXPECT_EQ(swap->state(), SwapState::kMemory);
  EXPECT_EQ(pool_->Numbers().blocks_free, pool_->Numbers().blocks_total);
  const std::int32_t slot = In(swap);
  EXPECT_EQ(program_->length(slot), 0);
  WriteStamped(pool_.get(), program_.get(), slot, 20, 1);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, WantedWhileItIsWritten) {
  io_->hold_writes = true;
  const SwapPtr swap = Out(Begin(40, 1));
  EXPECT_EQ(swap->state(), SwapState::kWriting);
  EXPECT_EQ(pool_->Numbers().blocks_draining, 3 * ranges());
  EXPECT_EQ(pool_->SwapWrites(), 1);
  const std::int32_t slot = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 40, 1), 40);
  EXPECT_EQ(pool_->Numbers().blocks_draining, 0);
  io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return pool_->SwapWrites() == 0; }));
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 40, 1), 40);
  EXPECT_TRUE(Soon([&] { return NothingLeft(); }));
}

TEST_P(SwappingTest, PrefetchedWhileItIsWritten) {
  io_->hold_writes = true;
  const SwapPtr swap = Out(Begin(40, 1));
  ASSERT_OK(pool_->Prefetch(swap).status);
  EXPECT_EQ(swap->state(), SwapState::kMemory);
  io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return pool_->SwapWrites() == 0; }));
  EXPECT_EQ(swap->state(), SwapState::kMemory);
  EXPECT_EQ(CountStamped(pool_.get(), In(swap), 0, 40, 1), 40);
  EXPECT_TRUE(NothingLeft());
}

// Their blocks may belong to others by the time the store would copy them.
TEST_P(SwappingTest, NothingIsCopiedForAWriteThatIsNoLongerWanted) {
  store::StoreOptions options;
  options.io = io_;
  options.writers = 1;
  store_ = store::testing::OpenStore(folder_, options);
  io_->hold_writes = true;
  const SwapPtr first = Out(Begin(20, 1));  // the only writer waits for the disk
  const SwapPtr dropped = Out(Begin(20, 2));
  pool_->DropSwapped(dropped);
  const SwapPtr fetched = Out(Begin(20, 3));
  ASSERT_OK(pool_->Prefetch(fetched).status);
  const std::int32_t back = In(Out(Begin(20, 4)));
  io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return pool_->SwapWrites() == 0; }));
  EXPECT_EQ(first->state(), SwapState::kStored);
  EXPECT_EQ(store_->Numbers().blocks_written, 2) << "those of the first";
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 20, 4), 20);
}

// The swapped sequence knows its blocks by number.
TEST_P(SwappingTest, RelocationLeavesItsBlocksInPlace) {
  const std::int32_t parent = program_->AcquirePrefix({7}).slots[0], other = program_->Acquire(1);
  for (int i = 0; i < 3; ++i) {
    WriteStamped(pool_.get(), program_.get(), parent, 16, 1);
    WriteStamped(pool_.get(), program_.get(), other, 16, 2);
  }
  const SwapPtr swap = Out(program_->Fork(parent));
  program_->Release(parent);
  EXPECT_EQ(swap->state(), SwapState::kMemory) << "the parent has all of it";
  relocation::Report report;
  EXPECT_OK(pool_->Relocate({1 << 30, /*everything=*/true, {}, /*huge_pages=*/false}, &report));
  EXPECT_EQ(report.blocks_moved, 0);
  EXPECT_TRUE(AllRight());
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 48, 1), 48);
  EXPECT_OK(pool_->Relocate({1 << 30, /*everything=*/true, {}, /*huge_pages=*/false}, &report));
  EXPECT_GT(report.blocks_moved, 0);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 48, 1), 48);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, GivenUpAtAnyTime) {
  const SwapPtr queued = StartOut(Begin(40, 1));
  pool_->DropSwapped(queued);
  ASSERT_OK(program_->Vacate(queued->slot));
  EXPECT_TRUE(NothingLeft());
  EXPECT_EQ(pool_->Numbers().slots_draining, 0);

  io_->hold_writes = true;
  const SwapPtr writing = Out(Begin(40, 1));
  pool_->DropSwapped(writing);
  EXPECT_EQ(pool_->Numbers().blocks_free, pool_->Numbers().blocks_total);
  const std::int32_t other = Begin(60, 2);
  io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return pool_->SwapWrites() == 0; }));
  EXPECT_EQ(CountStamped(pool_.get(), other, 0, 60, 2), 60);
  EXPECT_TRUE(Soon([&] { return NothingLeft(); }));

  const SwapPtr reading = OutToDisk(Begin(40, 1));
  io_->hold_reads = true;
  ASSERT_OK(pool_->Prefetch(reading).status);
  pool_->DropSwapped(reading);
  EXPECT_EQ(pool_->Numbers().blocks_swapped, 3 * ranges());  // the reader's
  io_->hold_reads = false;
  EXPECT_TRUE(Soon([&] { return NothingLeft(); }));
  EXPECT_EQ(reading->state(), SwapState::kGone);

  const SwapPtr stored = OutToDisk(Begin(40, 1));
  pool_->DropSwapped(stored);
  pool_->DropSwapped(stored);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, AReaderKeepsTheSlotAndNotTheWriter) {
  const std::int32_t slot = Begin(40, 1);
  ASSERT_OK(pool_->Extend({slot}, {48}).status);
  auto pinned = std::make_unique<PinnedSlots>();
  ASSERT_OK(program_->Begin(slot, 1, 0, true, pinned.get()));
  program_->SetEpoch(pinned->epoch());
  auto reader = std::make_unique<PinnedSlots>();
  pinned.reset();
  ASSERT_OK(program_->Begin(slot, 1, 0, false, reader.get()));
  const SwapPtr swap = OutToDisk(slot);
  EXPECT_EQ(pool_->Numbers().slots_draining, 1);
  EXPECT_EQ(CountStamped(pool_.get(), slot, 0, 40, 1), 40);
  EXPECT_EQ(pool_->Numbers().blocks_draining, 3 * ranges());
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  const std::int32_t back = In(swap);
  EXPECT_NE(back, slot);
  reader.reset();
  EXPECT_EQ(pool_->Numbers().slots_draining, 0);
  EXPECT_EQ(pool_->Numbers().blocks_free, pool_->Numbers().blocks_total - 3 * ranges());
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, ATruncationThatIsQueuedComesFirst) {
  const std::int32_t parent = Begin(60, 1);
  const std::int32_t child = program_->Fork(parent);
  ASSERT_OK(pool_->Truncate({child}, {20}).status);
  const SwapPtr swap = StartOut(child);
  ASSERT_OK(program_->RunTruncate(child, 20));
  ASSERT_OK(program_->Vacate(child));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; }));
  EXPECT_EQ(pool_->Numbers().swaps.bytes_swapped_out, ranges() * geometry_.block_bytes);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 20, 1), 20);
  EXPECT_EQ(CountStamped(pool_.get(), parent, 0, 60, 1), 60);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, WritesAreWaitedFor) {
  io_->hold_writes = true;
  const SwapPtr swap = Out(Begin(100, 1));
  EXPECT_EQ(pool_->Acquire({128, 128, 128}).draining, 7 * ranges());
  EXPECT_FALSE(pool_->WaitForDrain(0.01));
  io_->hold_writes = false;
  EXPECT_TRUE(pool_->WaitForDrain(60));
  EXPECT_EQ(swap->state(), SwapState::kStored);
  EXPECT_OK(pool_->Acquire({128, 128, 128}).status);
  EXPECT_EQ(pool_->Prefetch(swap).status.reason(), Reason::kOutOfBlocks);
  EXPECT_EQ(swap->state(), SwapState::kStored);
}

INSTANTIATE_TEST_SUITE_P(Layouts, SwappingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& param) { return param.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
