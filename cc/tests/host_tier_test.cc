// Evicted prefixes in host memory: what is read back, what is dropped when the limit is reached, and whose it is.
// device_host_tier_test.cc covers the same with the CUDA kernels and the driver's copies.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/host_tier_rig.h"
#include "tests/text.h"

namespace kvpage::testing {
namespace {

using store::testing::Soon;

class HostTierTest : public ::testing::TestWithParam<Layout> {
 protected:
  // Makes a store with room for this many logical blocks.
  void MakeStore(std::int64_t blocks) {
    store_ = std::make_shared<store::HostStore>(blocks * 4096 * SmallGeometry(GetParam()).num_ranges());
  }
  std::unique_ptr<HostTierRig> Open(std::int64_t blocks, double write_ahead) {
    if (store_ == nullptr) MakeStore(100);
    return std::make_unique<HostTierRig>(GetParam(), blocks, write_ahead, store_);
  }

  // A store thread may hold the last reference to a pool, but must not hold the last one to the store.
  void TearDown() override { store_->Close(); }

  std::shared_ptr<store::HostStore> store_;
};

TEST_P(HostTierTest, EverythingComesBack) {
  const auto rig = Open(30, 1);
  for (std::int32_t i = 1; i <= 3; ++i) rig->Run(Text(i, 4));
  const std::vector<std::int32_t> longer = Text(1, 6);
  rig->Run(longer);  // continues a sequence that is already stored
  ASSERT_TRUE(Soon([&] { return rig->Spills().tokens == 14 * 16; }));
  EXPECT_EQ(rig->Spills().bytes, 14 * rig->logical_bytes());
  EXPECT_GT(rig->Spills().latencies.median, 0);
  EXPECT_EQ(store_->Numbers().prefixes.bytes, 14 * rig->logical_bytes());
  EXPECT_EQ(store_->Numbers().used_bytes, 14 * rig->logical_bytes());
  rig->EvictAll();
  EXPECT_EQ(rig->pool().StoreNumbers().unwritten_evictions, 0);
  const Claim claim = rig->program().AcquirePrefix(longer);
  EXPECT_EQ(claim.tokens[0], 0);
  EXPECT_EQ(claim.stored[0], 96);
  rig->program().Release(claim.slots[0]);
  for (const auto& ids : {longer, Text(2, 4), Text(3, 4)}) {
    const auto length = static_cast<std::int64_t>(ids.size());
    EXPECT_EQ(rig->Fetch(ids), length - 1);
    EXPECT_EQ(rig->Run(ids), length - 1);
  }
  usleep(20000);
  EXPECT_EQ(rig->Spills().tokens, 14 * 16) << "what was read is not written again";
  const prefix::TierNumbers numbers = rig->pool().StoreNumbers();
  EXPECT_EQ(numbers.store_hits, 14 * 16);
  EXPECT_EQ(numbers.fetches.requests, 3);
  EXPECT_GT(numbers.read_bytes_per_second, 0);
  EXPECT_EQ(store_->Numbers().prefixes.bytes_read, 14 * rig->logical_bytes());
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierTest, WhatIsEvictedNextIsWrittenDownToTheShare) {
  const auto rig = Open(20, 0.5);
  rig->Run(Text(1, 3));
  rig->Run(Text(2, 3));
  usleep(20000);
  EXPECT_EQ(rig->Spills().tokens, 0);  // 12 of 20 blocks are free
  rig->Run(Text(3, 3));                // 8 are free
  ASSERT_TRUE(Soon([&] { return rig->Spills().tokens == 3 * 16; }));
  usleep(20000);
  EXPECT_EQ(rig->Spills().tokens, 3 * 16);
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierTest, TheLeastRecentlyUsedGoFirst) {
  MakeStore(12);
  const auto rig = Open(60, 1);
  const auto wait = [&](std::int64_t blocks) {
    ASSERT_TRUE(Soon([&] { return rig->Spills().tokens == blocks * 16; })) << rig->Spills().tokens;
  };
  for (std::int32_t i = 1; i <= 3; ++i) {
    rig->Run(Text(i, 4));
    wait(4 * i);
  }
  rig->EvictAll();
  EXPECT_EQ(rig->Fetch(Text(1, 4)), 64);  // used, so that the second one is now the oldest
  rig->Run(Text(4, 3));
  wait(15);
  EXPECT_EQ(rig->Stored(Text(1, 4)), 4);
  EXPECT_EQ(rig->Stored(Text(2, 4)), 0);
  EXPECT_EQ(rig->Stored(Text(3, 4)), 4);
  EXPECT_EQ(rig->Stored(Text(4, 3)), 3);
  // A continuation neither evicts the beginning of its sequence, nor stays without it.
  rig->Run(Text(3, 6));
  wait(17);
  EXPECT_EQ(rig->Stored(Text(3, 6)), 6);
  EXPECT_EQ(rig->Stored(Text(1, 4)), 0);
  EXPECT_EQ(store_->Numbers().prefixes.bytes_evicted, 8 * rig->logical_bytes());
  EXPECT_LE(store_->Numbers().pinned_bytes, store_->Numbers().limit_bytes);
  // A sequence of one block still fits, and evicts nothing.
  rig->Run(Text(6, 1));
  wait(18);
  EXPECT_EQ(store_->Numbers().prefixes.refused_writes, 0);
  EXPECT_EQ(rig->Stored(Text(3, 6)), 6);
  EXPECT_TRUE(rig->Whole());
}

TEST_P(HostTierTest, ASequenceThatIsTooLongIsRefused) {
  MakeStore(4);
  const auto rig = Open(60, 1);
  rig->Run(Text(1, 3));
  ASSERT_TRUE(Soon([&] { return rig->Spills().tokens == 48; }));
  rig->Run(Text(2, 5));
  ASSERT_TRUE(Soon([&] { return rig->Spills().failed == 1; }));
  EXPECT_EQ(store_->Numbers().prefixes.refused_writes, 1);
  EXPECT_NE(store_->Numbers().prefixes.last_error.find("do not fit in a store of"), std::string::npos);
  EXPECT_EQ(rig->Stored(Text(1, 3)), 3) << "nothing goes for what does not fit";
}

TEST_P(HostTierTest, SwappedSequencesTakeTheRoomOfPrefixes) {
  MakeStore(6);
  const auto rig = Open(30, 1);
  rig->Run(Text(1, 5));
  ASSERT_TRUE(Soon([&] { return rig->Spills().tokens == 80; }));
  const std::int32_t slot = rig->program().Acquire(64);
  WriteStamped(&rig->pool(), &rig->program(), slot, 64, 5);
  SwapPtr swap;
  ASSERT_OK(rig->pool().SwapOut(slot, store_, &swap));
  ASSERT_OK(rig->program().Vacate(slot));
  EXPECT_TRUE(Soon([&] { return swap->state() == SwapState::kStored; })) << store_->Numbers().last_error;
  EXPECT_EQ(rig->Stored(Text(1, 5)), 0);
  EXPECT_EQ(store_->Numbers().used_bytes, 4 * rig->logical_bytes());
  EXPECT_GT(store_->Numbers().swap_outs.median, 0);
  EXPECT_EQ(store_->Numbers().swap_ins.median, 0);
  // Prefixes do not take the room of swapped sequences either.
  rig->Run(Text(2, 3));
  EXPECT_TRUE(Soon([&] { return store_->Numbers().prefixes.refused_writes == 1; }));
  EXPECT_EQ(swap->state(), SwapState::kStored);
  ASSERT_OK(rig->pool().Prefetch(swap).status);
  ASSERT_TRUE(swap->Wait(60));
  EXPECT_GT(store_->Numbers().swap_ins.median, 0);
  rig->pool().DropSwapped(swap);
}

TEST_P(HostTierTest, PoolsFindTheirOwnOnly) {
  const auto first = Open(30, 1), second = Open(30, 1);
  first->Run(Text(1, 4), 1);
  second->Run(Text(1, 5), 2);
  ASSERT_TRUE(Soon([&] { return first->Spills().tokens == 64 && second->Spills().tokens == 80; }));
  first->EvictAll();
  second->EvictAll();
  EXPECT_EQ(first->Stored(Text(1, 5)), 4);
  EXPECT_EQ(first->Fetch(Text(1, 5)), 64);
  EXPECT_EQ(second->Fetch(Text(1, 5)), 80);
  EXPECT_EQ(first->Run(Text(1, 4), 1), 64);
  EXPECT_EQ(second->Run(Text(1, 5), 2), 80);
  EXPECT_EQ(store_->Numbers().prefixes.bytes, 9 * first->logical_bytes());
}

TEST_P(HostTierTest, PrefixesGoWithTheirPool) {
  const auto stays = Open(30, 1);
  auto goes = Open(30, 1);
  stays->Run(Text(1, 4));
  goes->Run(Text(2, 5));
  ASSERT_TRUE(Soon([&] { return stays->Spills().tokens == 64 && goes->Spills().tokens == 80; }));
  goes.reset();
  EXPECT_EQ(store_->Numbers().prefixes.bytes, 4 * stays->logical_bytes());
  EXPECT_EQ(store_->Numbers().used_bytes, 4 * stays->logical_bytes());
  store_->Close();
  EXPECT_EQ(store_->Numbers().used_bytes, 0);
  EXPECT_EQ(stays->Stored(Text(1, 4)), 0);
  EXPECT_GE(stays->Run(Text(3, 5)), 0);
}

TEST_P(HostTierTest, TheStoreIsOfThePlatformsKind) {
  MakeStore(4);
  PrefixRig rig(GetParam());
  const Status status = rig.pool->AttachStore(std::make_shared<store::HostTier>(store_), 1);
  EXPECT_EQ(status.code(), Code::kUnimplemented);
  EXPECT_NE(status.message().find("on disk for a pool on CPU"), std::string::npos) << status.message();
  store_->Close();
  EXPECT_EQ(rig.pool->AttachStore(std::make_shared<store::HostTier>(store_), 1).reason(), Reason::kClosed);
}

INSTANTIATE_TEST_SUITE_P(Layouts, HostTierTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
