// Sequences that leave their slots and come back: contents and accounts, whatever else happens meanwhile.
#include <gtest/gtest.h>

#include <cerrno>
#include <memory>
#include <utility>

#include "tests/expect_ok.h"
#include "tests/faulty_io.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"
#include "tests/store_util.h"

namespace kvpage::testing {
namespace {

using store::testing::FaultyIo;
using store::testing::Soon;
using store::testing::TemporaryFolder;

class SwappingTest : public ::testing::TestWithParam<Layout> {
 protected:
  SwappingTest() : geometry_(SmallGeometry(GetParam())) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry_));
    vmm_ = faulty.get();
    pool_ = MakePool(geometry_, 24 * ranges(), {}, std::move(faulty));
    program_ = std::make_unique<Program>(pool_.get());
    store::StoreOptions options;
    options.io = io_;
    store_ = store::testing::OpenStore(folder_, options);
  }
  ~SwappingTest() override {
    io_->hold_reads = io_->hold_writes = false;
    pool_->Close();
  }

  std::int64_t ranges() const { return geometry_.num_ranges(); }
  std::int32_t Begin(std::int32_t tokens, float stamp) {
    const std::int32_t slot = program_->Acquire(tokens);
    WriteStamped(pool_.get(), program_.get(), slot, tokens, stamp);
    return slot;
  }
  SwapPtr StartOut(std::int32_t slot) {
    SwapPtr swap;
    EXPECT_OK(pool_->SwapOut(slot, store_.get(), &swap));
    return swap;
  }
  SwapPtr Out(std::int32_t slot) {
    SwapPtr swap = StartOut(slot);
    EXPECT_OK(program_->Vacate(slot));
    return swap;
  }
  SwapPtr OutToDisk(std::int32_t slot) {
    SwapPtr swap = Out(slot);
    EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kDisk; }));
    return swap;
  }
  std::int32_t In(const SwapPtr& swap) {
    const Claim claim = pool_->SwapIn(swap);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    EXPECT_OK(RunIn(claim));
    return claim.slots[0];
  }
  Status RunIn(const Claim& claim) {
    const auto tokens = static_cast<std::int32_t>(claim.tokens[0]);
    std::vector<std::int32_t> lengths(kSlots);
    std::uint32_t epoch = 0;
    Status status =
        EditOne(pool_.get(), "swap_in", program_->cache(),
                {static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], tokens}, &epoch, lengths.data());
    if (status.ok()) program_->Set(epoch, std::move(lengths));
    return status;
  }
  bool AllRight() { return AddsUp(pool_.get()) && pool_->Audit().ok(); }
  // Whether no swapped sequence has anything left anywhere.
  bool NothingLeft() {
    const PoolNumbers n = pool_->Numbers();
    return n.sequences_swapped == 0 && n.blocks_swapped == 0 && store_->Numbers().bytes_swapped == 0 && AllRight();
  }

  const Geometry geometry_;
  const TemporaryFolder folder_;
  const std::shared_ptr<FaultyIo> io_ = std::make_shared<FaultyIo>();
  std::unique_ptr<store::BlockStore> store_;
  FaultyVmm* vmm_ = nullptr;
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Program> program_;
};

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
  // Behind its tokens there is nothing of another's.
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
  ASSERT_OK(program_->Write(slot, 4));  // queued before; not committed, so not kept
  ASSERT_OK(program_->Vacate(slot));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kDisk; }));
  EXPECT_EQ(swap->tokens(), 20);
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

TEST_P(SwappingTest, AFullDiskLosesNothing) {
  io_->write_error = ENOSPC;
  const std::int32_t parent = Begin(40, 1);
  const std::int32_t child = program_->Fork(parent);
  WriteStamped(pool_.get(), program_.get(), child, 30, 2);
  const SwapPtr swap = Out(child);
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kMemory; }));
  EXPECT_EQ(pool_->Numbers().blocks_draining, 0);
  EXPECT_TRUE(AllRight());
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_EQ(CountStamped(pool_.get(), back, 40, 70, 2), 30);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, AReadThatFailsKeepsWhatIsThere) {
  const std::int32_t parent = Begin(40, 1);
  const std::int32_t child = program_->Fork(parent);
  const SwapPtr swap = OutToDisk(child);
  io_->read_error = EIO;
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  EXPECT_EQ(swap->state(), SwapState::kDamaged);
  EXPECT_EQ(swap->tokens_in_memory(), 32);
  const Status status = pool_->SwapIn(swap).status;
  EXPECT_TRUE(Mentions(status, "(unreadable): the first 32 of 40 tokens are recoverable")) << status.message();
  EXPECT_EQ(pool_->Numbers().blocks_swapped, 2 * ranges());
  EXPECT_TRUE(AllRight());
  pool_->DropSwapped(swap);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, MappingsThatFailLeaveItSwapped) {
  const std::int32_t parent = Begin(40, 1);
  const std::int32_t child = program_->Fork(parent);
  WriteStamped(pool_.get(), program_.get(), child, 30, 2);
  const SwapPtr swap = OutToDisk(child);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  for (const Verb verb : {Verb::kMapReadOnly, Verb::kMap}) {
    for (int call = 0; call < ranges(); ++call) {
      vmm_->FailAt(verb, call);
      EXPECT_FALSE(pool_->SwapIn(swap).status.ok());
      EXPECT_TRUE(vmm_->failed());
      EXPECT_EQ(swap->state(), SwapState::kMemory);
      EXPECT_EQ(pool_->Numbers().slots_occupied, 1);
      EXPECT_TRUE(AllRight());
    }
  }
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 40, 1), 40);
  EXPECT_EQ(CountStamped(pool_.get(), back, 40, 70, 2), 30);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, WhatWasNotQueuedIsTakenBack) {
  const std::int32_t slot = Begin(40, 1);
  const SwapPtr never = StartOut(slot);
  UndoRelease(*pool_, {slot});
  EXPECT_EQ(never->state(), SwapState::kGone);
  WriteStamped(pool_.get(), program_.get(), slot, 10, 1);
  const SwapPtr swap = OutToDisk(slot);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  const Claim claim = pool_->SwapIn(swap);
  ASSERT_OK(claim.status);
  pool_->UndoSwapIn(swap, claim.slots[0]);
  EXPECT_EQ(pool_->Numbers().slots_occupied, 0);
  EXPECT_TRUE(AllRight());
  EXPECT_EQ(CountStamped(pool_.get(), In(swap), 0, 50, 1), 50);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, ANewGenerationLosesNeither) {
  const SwapPtr in = OutToDisk(Begin(40, 1));
  ASSERT_OK(pool_->Prefetch(in).status);
  ASSERT_TRUE(in->Wait(60));
  const Claim claim = pool_->SwapIn(in);  // its program does not run, nor does that of the next
  const SwapPtr out = StartOut(Begin(30, 2));
  program_->Restart();
  EXPECT_EQ(program_->length(claim.slots[0]), 40);
  EXPECT_EQ(CountStamped(pool_.get(), claim.slots[0], 0, 40, 1), 40);
  EXPECT_TRUE(Soon([&] { return out->state() == SwapState::kDisk; }));
  EXPECT_EQ(out->tokens(), 30);
  EXPECT_TRUE(AllRight());
}

TEST_P(SwappingTest, ATruncationThatIsQueuedComesFirst) {
  const std::int32_t parent = Begin(60, 1);
  const std::int32_t child = program_->Fork(parent);
  ASSERT_OK(pool_->Truncate({child}, {20}).status);
  const SwapPtr swap = StartOut(child);
  ASSERT_OK(program_->RunTruncate(child, 20));
  ASSERT_OK(program_->Vacate(child));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kDisk; }));
  EXPECT_EQ(pool_->Numbers().swaps.bytes_swapped_out, ranges() * geometry_.block_bytes);
  ASSERT_OK(pool_->Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  const std::int32_t back = In(swap);
  EXPECT_EQ(CountStamped(pool_.get(), back, 0, 20, 1), 20);
  EXPECT_EQ(CountStamped(pool_.get(), parent, 0, 60, 1), 60);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingTest, TheStoreClosesFirst) {
  io_->hold_writes = true;
  const SwapPtr writing = Out(Begin(20, 1));
  const SwapPtr queued = StartOut(Begin(30, 2));
  io_->hold_writes = false;
  store_->Close();
  ASSERT_OK(program_->Vacate(queued->slot));
  EXPECT_EQ(queued->state(), SwapState::kMemory);
  EXPECT_EQ(CountStamped(pool_.get(), In(queued), 0, 30, 2), 30);
  EXPECT_TRUE(AllRight());
}

TEST_P(SwappingTest, ThePoolClosesFirst) {
  const SwapPtr stored = OutToDisk(Begin(20, 1));
  const SwapPtr reading = OutToDisk(Begin(20, 1));
  io_->hold_reads = true;
  ASSERT_OK(pool_->Prefetch(reading).status);
  io_->hold_writes = true;
  const SwapPtr writing = Out(Begin(20, 1));
  pool_->Close();
  EXPECT_EQ(stored->state(), SwapState::kGone);
  EXPECT_EQ(writing->state(), SwapState::kGone);
  EXPECT_EQ(pool_->Prefetch(stored).status.reason(), Reason::kClosed);
  std::weak_ptr<Pool> left = pool_;
  program_.reset();
  pool_.reset();
  EXPECT_FALSE(left.expired());  // the store reads into its memory
  io_->hold_reads = io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return left.expired(); }));
  EXPECT_EQ(reading->state(), SwapState::kGone);
  EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
  pool_ = MakePool(geometry_, 8);
}

TEST_P(SwappingTest, WritesAreWaitedFor) {
  io_->hold_writes = true;
  const SwapPtr swap = Out(Begin(100, 1));
  EXPECT_EQ(pool_->Acquire({128, 128, 128}).draining, 7 * ranges());
  EXPECT_FALSE(pool_->WaitForDrain(0.01));
  io_->hold_writes = false;
  EXPECT_TRUE(pool_->WaitForDrain(60));
  EXPECT_EQ(swap->state(), SwapState::kDisk);
  EXPECT_OK(pool_->Acquire({128, 128, 128}).status);
  EXPECT_EQ(pool_->Prefetch(swap).status.reason(), Reason::kOutOfBlocks);
  EXPECT_EQ(swap->state(), SwapState::kDisk);
}

INSTANTIATE_TEST_SUITE_P(Layouts, SwappingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& param) { return param.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
