// Reads of stored prefixes into a pool in use: what remains if the disk is slow, the pool is closed, or nobody waits.
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "tests/expect_ok.h"
#include "tests/store_rig.h"

namespace kvpage::testing {
namespace {

using prefix::FetchTicket;
using store::testing::TemporaryFolder;

class PrefixFetchTest : public ::testing::TestWithParam<Layout> {
 protected:
  PrefixFetchTest() {
    store::StoreOptions options;
    options.io = io_;
    store_ = OpenShared(folder_, options);
  }
  // Makes a rig with a store that holds 64 sevens.
  std::unique_ptr<PrefixRig> Stored(std::int64_t blocks = 24) {
    PrefixRig first(GetParam());
    first.Fill(70);
    prefix::Saved saved;
    EXPECT_OK(first.pool->SavePrefixes(store_.get(), {}, {}, &saved));
    auto rig = std::make_unique<PrefixRig>(GetParam(), blocks);
    EXPECT_OK(rig->pool->AttachStore(store_, 0));
    return rig;
  }

  const TemporaryFolder folder_;
  const std::shared_ptr<HeldIo> io_ = std::make_shared<HeldIo>();
  std::shared_ptr<store::BlockStore> store_;
};

std::shared_ptr<FetchTicket> Fetch(Pool* pool, const std::vector<std::int32_t>& ids, double rate = 0) {
  std::shared_ptr<FetchTicket> ticket;
  EXPECT_OK(pool->Prefetch({"", ids, rate}, &ticket));
  return ticket;
}

TEST_P(PrefixFetchTest, BlocksAreTakenWhileTheyAreRead) {
  const auto rig = Stored();
  Pool* const pool = rig->pool.get();
  const std::int64_t ranges = rig->geometry.num_ranges();
  io_->hold = true;
  const auto ticket = Fetch(pool, Sevens(70));
  EXPECT_FALSE(ticket->Wait(0.01));
  EXPECT_EQ(pool->Numbers().blocks_mapped, 4 * ranges);
  EXPECT_TRUE(AddsUp(pool));
  EXPECT_OK(pool->Audit());
  // The same tokens are read only once.
  EXPECT_EQ(Fetch(pool, Sevens(66)), ticket);
  const Claim claim = rig->program->AcquirePrefix(Sevens(70, 8));
  ASSERT_OK(claim.status);
  EXPECT_EQ(claim.tokens[0], 0);
  EXPECT_EQ(claim.stored[0], 64);
  io_->hold = false;
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 64);
  EXPECT_EQ(ticket->error(), "");
  EXPECT_EQ(pool->Numbers().blocks_cached, 4 * ranges);
  const Claim again = rig->program->AcquirePrefix(Sevens(70, 9));
  EXPECT_EQ(again.tokens[0], 64);
  EXPECT_EQ(again.stored[0], 0);
  EXPECT_EQ(CountStamped(pool, again.slots[0], 0, 64, 1), 64);
  EXPECT_TRUE(AddsUp(pool));
  EXPECT_OK(pool->Audit());
}

TEST_P(PrefixFetchTest, WhatWasComputedMeanwhileIsKept) {
  const auto rig = Stored();
  io_->hold = true;
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  rig->Fill(40, 2);  // the same tokens with different bytes, in order to tell them apart
  io_->hold = false;
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 32);
  EXPECT_EQ(ticket->error(), "");
  const Claim claim = rig->program->AcquirePrefix(Sevens(70, 8));
  ASSERT_EQ(claim.tokens[0], 64);
  EXPECT_EQ(CountStamped(rig->pool.get(), claim.slots[0], 0, 32, 2), 32);
  EXPECT_EQ(CountStamped(rig->pool.get(), claim.slots[0], 32, 64, 1), 32);
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixFetchTest, WhatIsReadBehindEvictedTokensIsDropped) {
  const auto rig = Stored();
  rig->Fill(33);
  io_->hold = true;
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  std::int64_t freed = 0;
  ASSERT_OK(rig->pool->Evict(1000, &freed));
  EXPECT_EQ(freed, 3 * rig->geometry.num_ranges());
  io_->hold = false;
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 0);
  EXPECT_EQ(ticket->error(), "the tokens before those that were read have been evicted meanwhile");
  EXPECT_EQ(rig->pool->StoreNumbers().fetches.missed.at("evicted"), 32);
  EXPECT_EQ(rig->pool->Numbers().blocks_free, rig->pool->Numbers().blocks_total);
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixFetchTest, CloseCancelsWhatHasNotBegun) {
  auto rig = Stored();
  PrefixRig* const made = rig.get();
  io_->hold = true;
  const auto ticket = Fetch(made->pool.get(), Sevens(70));
  ASSERT_TRUE(store::testing::Soon([&] { return io_->waiting > 0; }));
  // A caller that stopped waiting may close it again.
  EXPECT_EQ(made->pool->Close([] { return false; }).code(), Code::kFailedPrecondition);
  EXPECT_FALSE(ticket->Wait(0));
  std::thread let_go([&] {
    usleep(20000);
    io_->hold = false;
  });
  made->pool->Close();
  EXPECT_TRUE(ticket->Wait(0));
  EXPECT_TRUE(ticket->error().empty() || ticket->error() == "the pool was closed");
  let_go.join();
  std::shared_ptr<FetchTicket> late;
  EXPECT_EQ(made->pool->Prefetch({"", Sevens(70), 0}, &late).reason(), Reason::kClosed);
  rig.reset();
  EXPECT_EQ(store_.use_count(), 1);
}

TEST_P(PrefixFetchTest, APoolMayEndWithoutClose) {
  auto rig = Stored();
  io_->hold = true;
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  std::thread let_go([&] {
    usleep(20000);
    io_->hold = false;
  });
  rig.reset();
  EXPECT_TRUE(ticket->Wait(0));
  let_go.join();
}

TEST_P(PrefixFetchTest, AStoreThatClosesEndsItsReads) {
  const auto rig = Stored();
  io_->hold = true;
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  std::thread let_go([&] {
    usleep(20000);
    io_->hold = false;
  });
  store_->Close();
  let_go.join();
  ASSERT_TRUE(ticket->Wait(60));
  std::shared_ptr<FetchTicket> late;
  EXPECT_EQ(rig->pool->Prefetch({"", Sevens(70), 0}, &late).reason(), Reason::kClosed);
  EXPECT_TRUE(AddsUp(rig->pool.get()));
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixFetchTest, AReadThatFailsGivesItsBlocksBack) {
  const auto rig = Stored();
  io_->error = EIO;
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 0);
  EXPECT_EQ(ticket->error(), "0 tokens of 64 were read: a file is unreadable");
  EXPECT_EQ(rig->pool->Numbers().blocks_free, rig->pool->Numbers().blocks_total);
  io_->error = 0;
  ASSERT_OK(store_->Refresh());
  const auto again = Fetch(rig->pool.get(), Sevens(70));
  ASSERT_TRUE(again->Wait(60));
  EXPECT_EQ(again->tokens(), 64);
}

TEST_P(PrefixFetchTest, OnlyWhatWasReadIsIndexed) {
  const auto rig = Stored();
  ASSERT_EQ(folder_.files().size(), 1u);
  const std::string path = folder_.files()[0];
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-1, std::ios::end);
    const auto last = static_cast<char>(file.get() ^ 16);
    file.seekp(-1, std::ios::end);
    file.put(last);  // of the last block
  }
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 48);
  const Claim claim = rig->program->AcquirePrefix(Sevens(70, 8));
  ASSERT_EQ(claim.tokens[0], 48);
  EXPECT_EQ(CountStamped(rig->pool.get(), claim.slots[0], 0, 48, 1), 48);
  EXPECT_TRUE(AddsUp(rig->pool.get()));
  EXPECT_OK(rig->pool->Audit());
}

// Room is not made by evicting the tokens that come before.
TEST_P(PrefixFetchTest, WhatItContinuesIsNotEvictedForIt) {
  const auto rig = Stored(3);
  rig->Fill(33);
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->tokens(), 0);
  EXPECT_EQ(ticket->error(), "no free blocks");
  EXPECT_EQ(rig->pool->Numbers().blocks_cached, 3 * rig->geometry.num_ranges());
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixFetchTest, NoMemoryIsAMiss) {
  const auto rig = Stored();
  rig->vmm->FailAt(Verb::kCreate, 0);
  const auto ticket = Fetch(rig->pool.get(), Sevens(70));
  ASSERT_TRUE(ticket->Wait(60));
  EXPECT_EQ(ticket->error(), "no free blocks");
  EXPECT_TRUE(rig->vmm->failed());
  EXPECT_EQ(rig->pool->Numbers().blocks_free, rig->pool->Numbers().blocks_total);
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixFetchTest, ThreadsMeet) {
  const auto rig = Stored();
  Pool* const pool = rig->pool.get();
  std::atomic<bool> ended{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      while (!ended) static_cast<void>(Fetch(pool, Sevens(70))->Wait(0.001));
    });
  }
  threads.emplace_back([&] {
    std::int64_t freed = 0;
    while (!ended) EXPECT_OK(pool->Evict(4, &freed));
  });
  for (int i = 0; i < 50; ++i) {
    const Claim claim = rig->program->AcquirePrefix(Sevens(50 + i % 7, 8));
    ASSERT_OK(claim.status);
    const std::int64_t found = claim.tokens[0];
    EXPECT_EQ(CountStamped(pool, claim.slots[0], 0, found, 1), found);
    WriteStamped(pool, rig->program.get(), claim.slots[0], static_cast<std::int32_t>(60 - found), 1);
    rig->program->Release(claim.slots[0]);
    EXPECT_TRUE(AddsUp(pool));
    EXPECT_OK(pool->Audit());
  }
  ended = true;
  for (std::thread& thread : threads) thread.join();
}

TEST_P(PrefixFetchTest, AStoreNeedsAPoolOfItsProcessOnCpu) {
  PrefixRig rig(GetParam());
  store_->Close();
  EXPECT_EQ(rig.pool->AttachStore(store_, 0).reason(), Reason::kClosed);
  std::int64_t stored = -1;
  EXPECT_OK(rig.pool->StoredPrefix("", Sevens(70), &stored));
  EXPECT_EQ(stored, 0);
  EXPECT_TRUE(Fetch(rig.pool.get(), Sevens(70))->Wait(0));
}

INSTANTIATE_TEST_SUITE_P(Layouts, PrefixFetchTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
