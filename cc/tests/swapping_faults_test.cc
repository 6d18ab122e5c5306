// Swapping when operations fail, end early, or are undone.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <random>

#include "tests/swapping_util.h"

namespace kvpage::testing {
namespace {

class SwappingFaultsTest : public SwappingTest {
 protected:
  [[noreturn]] void SwapForEver(const std::string& path);
};

TEST_P(SwappingFaultsTest, AFullDiskLosesNothing) {
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

TEST_P(SwappingFaultsTest, AReadThatFailsKeepsWhatIsThere) {
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
  const Claim claim = pool_->SwapIn(swap, /*recover=*/true);
  ASSERT_OK(claim.status);
  ASSERT_OK(RunIn(claim));
  EXPECT_EQ(program_->length(claim.slots[0]), 32);
  EXPECT_EQ(CountStamped(pool_.get(), claim.slots[0], 0, 32, 1), 32);
  WriteStamped(pool_.get(), program_.get(), claim.slots[0], 20, 3);
  EXPECT_EQ(CountStamped(pool_.get(), parent, 0, 40, 1), 40);
  EXPECT_TRUE(NothingLeft());
}

TEST_P(SwappingFaultsTest, MappingsThatFailLeaveItSwapped) {
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

TEST_P(SwappingFaultsTest, WhatWasNotQueuedIsTakenBack) {
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

TEST_P(SwappingFaultsTest, ANewGenerationLosesNeither) {
  const SwapPtr in = OutToDisk(Begin(40, 1));
  ASSERT_OK(pool_->Prefetch(in).status);
  ASSERT_TRUE(in->Wait(60));
  const Claim claim = pool_->SwapIn(in);  // neither its program nor that of the next one runs
  const SwapPtr out = StartOut(Begin(30, 2));
  program_->Restart();
  EXPECT_EQ(program_->length(claim.slots[0]), 40);
  EXPECT_EQ(CountStamped(pool_.get(), claim.slots[0], 0, 40, 1), 40);
  EXPECT_TRUE(Soon([&] { return out->state() == SwapState::kStored; }));
  EXPECT_EQ(out->tokens(), 30);
  EXPECT_TRUE(AllRight());
}

TEST_P(SwappingFaultsTest, TheStoreClosesFirst) {
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

TEST_P(SwappingFaultsTest, TheStoreIsGone) {
  const SwapPtr stored = OutToDisk(Begin(20, 1));
  const SwapPtr queued = StartOut(Begin(30, 2));
  store_->Close();
  store_ = store::testing::OpenStore(folder_, {});
  ASSERT_OK(program_->Vacate(queued->slot));
  EXPECT_EQ(CountStamped(pool_.get(), In(queued), 0, 30, 2), 30);
  ASSERT_OK(pool_->Prefetch(stored).status);
  EXPECT_TRUE(Mentions(pool_->SwapIn(stored).status, "(closed): the first 0 of 20 tokens"));
  EXPECT_TRUE(AllRight());
}

TEST_P(SwappingFaultsTest, ThePoolClosesFirst) {
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
  EXPECT_FALSE(left.expired());  // the store is still reading into its memory
  io_->hold_reads = io_->hold_writes = false;
  EXPECT_TRUE(Soon([&] { return left.expired(); }));
  EXPECT_EQ(reading->state(), SwapState::kGone);
  EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes_swapped == 0; }));
  pool_ = MakePool(geometry_, 8);
}

void SwappingFaultsTest::SwapForEver(const std::string& path) {
  // A fork does not copy threads, so the child makes a new pool.
  const auto pool = MakePool(geometry_, 24 * ranges());
  Program program(pool.get());
  std::unique_ptr<store::BlockStore> opened;
  if (!store::BlockStore::Open(path, {}, &opened).ok()) std::abort();
  const std::shared_ptr<store::BlockStore> store = std::move(opened);
  while (true) {
    SwapPtr swaps[2];
    for (SwapPtr& swap : swaps) {
      const std::int32_t slot = program.Acquire(100);
      if (!program.Write(slot, 100).ok() || !pool->Commit(slot, std::vector<std::int32_t>(100, 7)).ok()) std::abort();
      if (!pool->SwapOut(slot, store, &swap).ok() || !program.Vacate(slot).ok()) std::abort();
    }
    while (swaps[0]->state() == SwapState::kWriting) usleep(10);
    if (!pool->Prefetch(swaps[0]).status.ok() || !swaps[0]->Wait(60)) std::abort();
    for (const SwapPtr& swap : swaps) pool->DropSwapped(swap);
  }
}

// A process that swaps is killed at any moment.
TEST_P(SwappingFaultsTest, AKilledProcessLeavesTheDirectoryUsable) {
  const char* const exhaustive = std::getenv("JAX_KVPAGE_TEST_EXHAUSTIVE");
  const int rounds = exhaustive != nullptr && exhaustive[0] == '1' ? 100 : 5;
  const store::testing::TemporaryFolder folder;
  std::minstd_rand random(static_cast<std::uint32_t>(GetParam()) + 1);
  for (int round = 0; round < rounds; ++round) {
    const pid_t child = fork();
    if (child == 0) SwapForEver(folder.path());
    usleep(5000 + random() % 40000);
    kill(child, SIGKILL);
    ASSERT_EQ(waitpid(child, nullptr, 0), child);
    // What was swapped is gone with the process; a file that it had just created is empty.
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
      EXPECT_EQ(entry.file_size(), 0u) << entry.path();
    }
    std::unique_ptr<store::BlockStore> opened;
    ASSERT_OK(store::BlockStore::Open(folder.path(), {}, &opened));
    EXPECT_EQ(opened->Numbers().files, 0);
    EXPECT_EQ(opened->Numbers().bytes_swapped, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, SwappingFaultsTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& param) { return param.param == Layout::kFused ? "Fused" : "PerLayer"; });

}  // namespace
}  // namespace kvpage::testing
