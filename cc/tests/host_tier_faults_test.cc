// Evicted prefixes in host memory, with copies that are slow or fail: nobody waits, and nothing wrong is read back.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/host_tier_rig.h"
#include "tests/prefix_threads.h"
#include "tests/text.h"

namespace kvpage::testing {
namespace {

using store::testing::Soon;

class HostTierFaultsTest : public ::testing::TestWithParam<Layout> {
 protected:
  std::unique_ptr<HostTierRig> Open(std::int64_t blocks, double write_ahead = 1) {
    store_ = std::make_shared<store::HostStore>(100 * 4096 * SmallGeometry(GetParam()).num_ranges());
    return std::make_unique<HostTierRig>(GetParam(), blocks, write_ahead, store_);
  }
  bool CopyIsHeld(HostTierRig* rig) const {
    return Soon([&] { return rig->mover().waiting > 0; });
  }

  // A store thread may hold the last reference to a pool, but must not hold the last one to the store.
  void TearDown() override { store_->Close(); }

  std::shared_ptr<store::HostStore> store_;
};

TEST_P(HostTierFaultsTest, ASlowMoverMakesNobodyWait) {
  const auto rig = Open(16);
  rig->mover().hold = true;
  for (std::int32_t i = 1; i <= 12; ++i) {
    EXPECT_EQ(rig->Run(Text(i, 5)), 0);
    EXPECT_TRUE(rig->Whole());
  }
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  // A program maps all the memory there is under the same pressure.
  std::vector<std::int32_t> slots;
  for (int i = 0; i < 2; ++i) {
    slots.push_back(rig->program().Acquire(1));
    for (std::int32_t tokens = 16; tokens <= 128; tokens += 16) {
      bool ok = false;
      ASSERT_OK(rig->program().Map(slots.back(), tokens, &ok));
      EXPECT_TRUE(ok);
    }
  }
  EXPECT_EQ(rig->pool().Numbers().blocks_free, 0);
  EXPECT_EQ(rig->Spills().tokens, 0);
  EXPECT_GT(rig->pool().StoreNumbers().unwritten_evictions, 30);
  rig->mover().hold = false;
  for (const std::int32_t slot : slots) rig->program().Release(slot);
  // Blocks that were taken away meanwhile do not count as written.
  for (std::int32_t i = 1; i <= 12; ++i) {
    rig->Fetch(Text(i, 5));
    rig->Run(Text(i, 5));  // compares whatever is found
  }
  EXPECT_TRUE(Soon([&] { return rig->Spills().tokens > 0; }));
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierFaultsTest, WhatIsEvictedWhileItIsCopiedIsNotStored) {
  const auto rig = Open(8);
  rig->mover().hold = true;
  rig->Run(Text(1, 5));
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  rig->EvictAll();
  rig->Run(Text(2, 7));  // in the same blocks
  rig->mover().hold = false;
  ASSERT_TRUE(Soon([&] { return rig->Stored(Text(2, 7)) == 7; }));
  EXPECT_EQ(rig->Stored(Text(1, 5)), 0);
  EXPECT_EQ(rig->Spills().failed, 0);
  EXPECT_EQ(rig->Spills().tokens, 7 * 16);
  EXPECT_EQ(store_->Numbers().used_bytes, 7 * rig->logical_bytes()) << "nothing is left of the first";
}

// The end of a sequence is evicted while all of it is copied: its beginning counts as written.
TEST_P(HostTierFaultsTest, WhatIsLeftOfASequenceIsStored) {
  const auto rig = Open(8);
  rig->mover().hold = true;
  rig->Run(Text(1, 6));
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  std::int64_t freed = 0;
  ASSERT_OK(rig->pool().Evict(2 * rig->ranges(), &freed));
  const std::int64_t left = rig->pool().Numbers().blocks_cached / rig->ranges();
  ASSERT_GT(left, 2);
  ASSERT_LT(left, 6);
  rig->mover().hold = false;
  ASSERT_TRUE(Soon([&] { return rig->Stored(Text(1, 6)) == left; })) << left;
  EXPECT_EQ(store_->Numbers().used_bytes, left * rig->logical_bytes());
  rig->EvictAll();
  EXPECT_EQ(rig->pool().StoreNumbers().unwritten_evictions, 6 - left);
  EXPECT_EQ(rig->Fetch(Text(1, 6)), left * 16);
  EXPECT_EQ(rig->Run(Text(1, 6)), left * 16);
}

// While blocks are copied, the same tokens are recomputed in the same blocks: half of each copy is old.
TEST_P(HostTierFaultsTest, ACopyOfBothIsNotStored) {
  const auto rig = Open(6);
  rig->mover().hold = true;
  rig->Run(Text(1, 5), 10);
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  rig->EvictAll();
  rig->Run(Text(1, 5), 20);
  rig->mover().hold = false;
  ASSERT_TRUE(Soon([&] { return rig->Stored(Text(1, 5)) == 5; }));
  rig->EvictAll();
  EXPECT_EQ(rig->Fetch(Text(1, 5)), 80);
  EXPECT_EQ(rig->Run(Text(1, 5), 20), 80);
}

// A slot is adopted and rolled back while its blocks are copied, and then the same tokens are rewritten.
TEST_P(HostTierFaultsTest, ARewrittenBlockIsNotStored) {
  const auto rig = Open(8);
  rig->mover().hold = true;
  rig->Run(Text(1, 5), 10);
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  const Claim claim = rig->program().AcquirePrefix(Text(1, 5));
  ASSERT_EQ(claim.tokens[0], 80);
  const std::int32_t slot = claim.slots[0];
  rig->program().Truncate(slot, 32);
  EXPECT_OK(rig->pool().Extend({slot}, {80}).status);
  EXPECT_OK(rig->program().Write(slot, 48));
  ForTokens(&rig->pool(), slot, 32, 80, [](float& at, float token) { at = 20000 + token; });
  EXPECT_OK(rig->pool().Commit(slot, std::vector<std::int32_t>(48, 1)));
  rig->program().Release(slot);
  rig->mover().hold = false;
  ASSERT_TRUE(Soon([&] { return rig->Stored(Text(1, 5)) == 5; }));
  rig->EvictAll();
  EXPECT_EQ(rig->Fetch(Text(1, 5)), 80);
  const Claim again = rig->program().AcquirePrefix(Text(1, 5));
  ASSERT_EQ(again.tokens[0], 80);
  EXPECT_EQ(CountStamped(&rig->pool(), again.slots[0], 0, 32, 10), 32);
  EXPECT_EQ(CountStamped(&rig->pool(), again.slots[0], 32, 80, 20), 48);
}

TEST_P(HostTierFaultsTest, MemoryThatIsCopiedStaysWithThePool) {
  const auto rig = Open(8);
  rig->mover().hold = true;
  rig->Run(Text(1, 5));
  ASSERT_TRUE(CopyIsHeld(rig.get()));
  rig->EvictAll();
  std::int64_t freed = -1;
  ASSERT_OK(rig->pool().Trim(&freed));
  EXPECT_EQ(freed, rig->ranges()) << "the partial block, which is not copied";
  const std::int64_t bytes = 8 * rig->logical_bytes();
  const Claim claim = rig->pool().Resize(bytes / 2);
  EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
  EXPECT_NE(claim.status.message().find("are being copied to the store"), std::string::npos) << claim.status.message();
  EXPECT_TRUE(rig->Whole());
  rig->mover().hold = false;
  EXPECT_TRUE(Soon([&] { return rig->pool().Resize(bytes / 2).status.ok(); }));
  ASSERT_OK(rig->pool().Trim(&freed));
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierFaultsTest, CopiesThatFail) {
  const auto rig = Open(16);
  rig->mover().fail = 1;
  rig->Run(Text(1, 5));
  ASSERT_TRUE(Soon([&] { return rig->Spills().failed == 1; }));
  EXPECT_EQ(store_->Numbers().prefixes.failed_writes, 1);
  EXPECT_EQ(store_->Numbers().prefixes.last_error, "a copy has failed");
  EXPECT_EQ(store_->Numbers().used_bytes, 0);
  rig->EvictAll();
  EXPECT_EQ(rig->pool().StoreNumbers().unwritten_evictions, 5);
  // It is retried after a while.
  ASSERT_TRUE(Soon([&] {
    rig->Run(Text(2, 5));
    return rig->Spills().tokens > 0;
  }));
  EXPECT_EQ(rig->Stored(Text(2, 5)), 5);
  rig->EvictAll();
  // Reading back fails: a miss, but the store still has it.
  rig->mover().fail = 1;
  std::string error;
  EXPECT_EQ(rig->Fetch(Text(2, 5), &error), 0);
  EXPECT_EQ(error, "0 tokens of 80 were read: a copy from host memory has failed");
  EXPECT_EQ(rig->pool().StoreNumbers().fetches.missed.at("unreadable"), 80);
  EXPECT_EQ(rig->pool().Numbers().blocks_free, rig->pool().Numbers().blocks_total);
  EXPECT_EQ(rig->Fetch(Text(2, 5), &error), 80);
  EXPECT_EQ(rig->Run(Text(2, 5)), 80);
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierFaultsTest, NoMemoryToPin) {
  const auto rig = Open(16);
  rig->mover().fail_buffers = true;
  rig->Run(Text(1, 5));
  ASSERT_TRUE(Soon([&] { return rig->Spills().failed == 1; }));
  EXPECT_EQ(store_->Numbers().prefixes.refused_writes, 1);
  EXPECT_EQ(store_->Numbers().pinned_bytes, 0);
  rig->EvictAll();
  EXPECT_EQ(rig->Run(Text(1, 5)), 0);
}

TEST_P(HostTierFaultsTest, PoolsAndStoresMayEndAtAnyTime) {
  for (int round = 0; round < 12; ++round) {
    auto rig = Open(16);
    rig->mover().hold = true;
    for (std::int32_t i = 1; i <= 4; ++i) rig->Run(Text(10 * round + i, 5));
    if (round % 2 == 0) {
      EXPECT_TRUE(CopyIsHeld(rig.get()));
    }
    std::thread ends([&] {
      usleep(2000);
      rig->mover().hold = false;
    });
    if (round % 3 == 0) rig->pool().Close();
    if (round % 3 == 1) store_->Close();
    ends.join();
    if (round % 3 == 1) {
      EXPECT_GE(rig->Run(Text(9, 5)), 0);
    }
    rig.reset();
    EXPECT_TRUE(Soon([&] { return store_->Numbers().used_bytes == 0; })) << round;
    store_->Close();
  }
}

TEST_P(HostTierFaultsTest, ThreadsMeet) {
  const auto rig = Open(24);
  RunBesideThreads(&rig->pool(), [&](const auto& text) {
    rig->Run(text);
    EXPECT_TRUE(rig->Whole());
  });
  EXPECT_TRUE(Soon([&] { return rig->Spills().tokens > 0; }));
}

INSTANTIATE_TEST_SUITE_P(Layouts, HostTierFaultsTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
