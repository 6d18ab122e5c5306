// What eviction removes and what pins and hints keep, case by case; and that policies differ as intended.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cache/prefix_index.h"

namespace kvpage::testing {
namespace {

using Tokens = std::vector<std::int32_t>;

constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

class PrefixEvictionTest : public ::testing::Test {
 protected:
  std::int64_t Found(const Tokens& tokens) {
    return index_.Find(space_, tokens.data(), static_cast<std::int64_t>(tokens.size())).tokens;
  }
  void Touch(const Tokens& tokens) { index_.Touch(space_, tokens.data(), static_cast<std::int64_t>(tokens.size())); }
  void Store(std::int32_t slot, const Tokens& tokens) {
    std::vector<std::int32_t> map(tokens.size()), referenced;
    std::iota(map.begin(), map.end(), 100 * slot);
    index_.Store(slot, space_, tokens.data(), static_cast<std::int64_t>(tokens.size()), map.data(), &referenced);
  }
  std::int64_t Pin(const Tokens& tokens, const PinOptions& options = {}) {
    return index_.Pin(space_, tokens.data(), static_cast<std::int64_t>(tokens.size()), options);
  }
  void Unpin(const Tokens& tokens) { index_.Unpin(space_, tokens.data(), static_cast<std::int64_t>(tokens.size())); }
  void Hint(const Tokens& tokens, PrefixHint hint) {
    index_.Hint(space_, tokens.data(), static_cast<std::int64_t>(tokens.size()), hint);
  }
  // Stored by a slot that then moves on to other tokens.
  void Leave(const Tokens& tokens) {
    Touch(tokens);
    Store(0, tokens);
    index_.Detach(0);
  }
  std::int64_t EvictAll() { return Evict(kAll); }
  std::int64_t Evict(std::int64_t enough) {
    std::int64_t freed;
    std::vector<std::int32_t> dropped;
    index_.Evict(index_.PlanEviction(
                     enough, [](const std::int32_t*, std::int32_t owner) { return owner < 0 ? 1 : -1; }, &freed),
                 &dropped);
    return freed;
  }

  PrefixIndex index_{2, 1};
  const std::int32_t space_ = index_.Namespace("");
};

TEST_F(PrefixEvictionTest, APinnedPrefixStaysUntilItIsUnpinnedAsOften) {
  Store(0, {1, 2, 3, 4, 5, 6});
  index_.Detach(0);
  EXPECT_EQ(Pin({1, 2, 3, 4, 9}), 4);
  EXPECT_EQ(Pin({1, 2, 3, 4, 9}), 4);
  EXPECT_EQ(index_.numbers().pinned, 2);
  EXPECT_EQ(EvictAll(), 1);
  Unpin({1, 2, 3, 4, 9});
  Unpin({1, 2, 3, 4});  // these tokens are not pinned
  EXPECT_EQ(EvictAll(), 0);
  Unpin({1, 2, 3, 4, 9});
  EXPECT_EQ(index_.numbers().pinned, 0);
  EXPECT_EQ(EvictAll(), 2);
}

TEST_F(PrefixEvictionTest, PinsOfTheSameTokensHoldWhatTheLastOneFound) {
  Leave({1, 2, 3});
  EXPECT_EQ(Pin({1, 2, 3, 4, 5, 6}), 3);
  Leave({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Pin({1, 2, 3, 4, 5, 6}), 6);
  EXPECT_EQ(index_.numbers().pinned, 3);
  EXPECT_EQ(EvictAll(), 1);  // {3}, which the first pin held
  Unpin({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(EvictAll(), 0);
  Unpin({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(EvictAll(), 3);
}

TEST_F(PrefixEvictionTest, PinsHaveACapAndExpire) {
  Store(0, {1, 2, 3, 4, 5, 6});
  Store(1, {7, 8, 9});
  index_.Detach(0);
  index_.Detach(1);
  EXPECT_EQ(Pin({1, 2, 3, 4, 5, 6}, {2, 10.0}), 4);
  EXPECT_EQ(Pin({7, 8, 9}, {2, 20.0}), 0);
  EXPECT_EQ(Pin({7, 8, 9}, {4, 20.0}), 3);
  index_.ExpirePins(9.9);
  EXPECT_EQ(EvictAll(), 1);
  index_.ExpirePins(10.0);
  EXPECT_EQ(EvictAll(), 2);
  index_.ExpirePins(20.0);
  EXPECT_EQ(EvictAll(), 2);
}

TEST_F(PrefixEvictionTest, ACutTakesPinnedEntriesAndThePinGoesBackToWhatIsLeft) {
  Store(0, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Pin({1, 2, 3, 4, 5, 6}), 6);
  std::vector<std::int32_t> dropped;
  index_.Cut(0, 3, 0, &dropped);
  EXPECT_EQ(index_.numbers().pinned, 2);
  index_.Cut(0, 2, 0, &dropped);
  EXPECT_EQ(index_.numbers().pinned, 1);
  index_.Detach(0);
  EXPECT_EQ(EvictAll(), 0);
  Unpin({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(EvictAll(), 1);
}

TEST_F(PrefixEvictionTest, RandomPinsProtectAndLeaveNothingBehind) {
  std::mt19937 random(0);
  const auto below = [&](int bound) { return static_cast<std::int32_t>(random() % bound); };
  std::vector<Tokens> pinned;
  for (int step = 0; step < 3000; ++step) {
    Tokens tokens(1 + below(7));
    for (std::int32_t& token : tokens) token = below(2);
    const std::int32_t slot = below(3);
    std::vector<std::int32_t> dropped;
    switch (below(6)) {
      case 0:
        if (Pin(tokens) > 0) pinned.push_back(tokens);
        break;
      case 1:
        if (pinned.empty()) break;
        std::swap(pinned[below(static_cast<int>(pinned.size()))], pinned.back());
        Unpin(pinned.back());
        pinned.pop_back();
        break;
      case 2:
        index_.Cut(slot, below(4), 0, &dropped);
        index_.Detach(slot);
        break;
      case 3:
        for (std::int32_t other = 0; other < 3; ++other) index_.Detach(other);
        EvictAll();
        ASSERT_EQ(index_.numbers().entries, index_.numbers().pinned);
        break;
      default:
        index_.Detach(slot);
        Store(slot, tokens);
    }
    ASSERT_LE(index_.numbers().pinned, index_.numbers().entries);
  }
  for (const Tokens& tokens : pinned) Unpin(tokens);
  EXPECT_EQ(index_.numbers().pinned, 0);
  for (std::int32_t slot = 0; slot < 3; ++slot) index_.Detach(slot);
  EvictAll();
  EXPECT_EQ(index_.numbers().entries, 0);
}

TEST_F(PrefixEvictionTest, WhatIsDroppedGoesFirstBackToWhatOthersContinue) {
  Leave({1, 2, 3, 4, 7, 8});
  Leave({9, 9});
  Leave({1, 2, 3, 4, 5, 6, 7, 8});
  Hint({1, 2, 3, 4, 5, 6, 7, 8}, PrefixHint::kDrop);
  EXPECT_EQ(Evict(2), 2);
  EXPECT_EQ(Found({1, 2, 3, 4, 5, 6, 7, 8}), 4);
  EXPECT_EQ(Found({1, 2, 3, 4, 7, 8}), 6);
  EXPECT_EQ(Found({9, 9}), 2);
  Hint({1, 2, 3, 4, 7, 8}, PrefixHint::kDrop);
  Touch({1, 2, 3, 4, 7, 8});  // it is requested after all
  EXPECT_EQ(Evict(1), 1);
  EXPECT_EQ(Found({9, 9}), 0);
}

TEST_F(PrefixEvictionTest, WhatIsRetainedOutlivesWhatCameLater) {
  Leave({1, 2});
  Leave({3, 4});
  Hint({1, 2}, PrefixHint::kRetain);
  Leave({5, 6});
  EXPECT_EQ(Evict(2), 2);
  EXPECT_EQ(Found({1, 2}), 2);
}

TEST_F(PrefixEvictionTest, FrequencyIsRememberedBeyondEviction) {
  for (int times = 0; times < 3; ++times) Leave({1, 2});
  EXPECT_EQ(EvictAll(), 1);
  Leave({1, 2});
  Leave({3, 4});
  EXPECT_EQ(Evict(1), 1);
  EXPECT_EQ(Found({1, 2}), 2);
  EXPECT_EQ(Found({3, 4}), 0);
}

TEST_F(PrefixEvictionTest, WhatFreesNothingStaysUnlessItContinuesWhatIsEvicted) {
  Store(1, {9, 9});        // block 100
  Store(2, {1, 2, 3, 4});  // blocks 200 and 201
  index_.Detach(1);
  index_.Detach(2);
  std::int64_t freed;
  const auto plan = [&](std::int32_t frees) {
    const auto count = [frees](const std::int32_t* blocks, std::int32_t) { return blocks[0] == frees ? 1 : 0; };
    return index_.PlanEviction(kAll, count, &freed);
  };
  EXPECT_TRUE(plan(-1).empty());
  EXPECT_EQ(plan(201).size(), 1);
  std::vector<std::int32_t> dropped;
  index_.Evict(plan(200), &dropped);
  EXPECT_EQ(dropped, (std::vector<std::int32_t>{201, 200}));
  EXPECT_EQ(freed, 1);
  EXPECT_EQ(Found({9, 9}), 2);
}

TEST_F(PrefixEvictionTest, PartialBlocksGoFirst) {
  Leave({1, 2, 3, 4});
  Leave({5});
  EXPECT_EQ(Evict(1), 1);
  EXPECT_EQ(Found({5}), 0);
}

TEST(PrefixPolicyTest, SegmentedLruProtectsAShareOfTheEntries) {
  PrefixIndex index(1, 1, PrefixPolicy::kSegmentedLru);
  const std::int32_t space = index.Namespace("");
  const auto touch = [&](std::int32_t token) {
    const std::int32_t block = token;
    std::vector<std::int32_t> referenced;
    index.Touch(space, &token, 1);
    index.Store(0, space, &token, 1, &block, &referenced);
    index.Detach(0);
  };
  for (std::int32_t token = 0; token < 5; ++token) touch(token);
  for (std::int32_t token = 0; token < 5; ++token) touch(token);  // the last one makes token 0 probationary again
  touch(5);
  std::int64_t freed;
  std::vector<std::int32_t> dropped;
  index.Evict(index.PlanEviction(6, [](const std::int32_t*, std::int32_t) { return 1; }, &freed), &dropped);
  EXPECT_EQ(dropped, (std::vector<std::int32_t>{0, 5, 1, 2, 3, 4}));
}

}  // namespace
}  // namespace kvpage::testing
