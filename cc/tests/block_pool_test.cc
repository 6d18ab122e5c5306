// The block pool's bookkeeping.
#include "cache/block_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace kvpage {
namespace {

using Blocks = std::vector<std::int32_t>;

TEST(BlockPoolTest, ClaimsNeighbours) {
  BlockPool pool(8);
  Blocks first, second, cold;
  EXPECT_TRUE(pool.Claim(3, -1, &first, &cold));
  EXPECT_EQ(first, (Blocks{0, 1, 2}));
  EXPECT_EQ(cold, first);
  EXPECT_TRUE(pool.Claim(1, 5, &second, &cold));
  EXPECT_EQ(second, Blocks{6});
}

TEST(BlockPoolTest, ClaimIsAllOrNothing) {
  BlockPool pool(4);
  Blocks taken, cold;
  EXPECT_TRUE(pool.Claim(3, -1, &taken, &cold));
  Blocks more, more_cold;
  EXPECT_FALSE(pool.Claim(2, -1, &more, &more_cold));
  EXPECT_TRUE(more.empty() && more_cold.empty());
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(BlockPoolTest, UnclaimRemembersWhatWasCold) {
  BlockPool pool(4);
  Blocks warm, cold;
  EXPECT_TRUE(pool.Claim(2, -1, &warm, &cold));
  for (std::int32_t block : warm) pool.Release(block);
  EXPECT_EQ(pool.num_warm(), 2);
  Blocks mixed, mixed_cold;
  EXPECT_TRUE(pool.Claim(3, -1, &mixed, &mixed_cold));
  EXPECT_EQ(mixed_cold.size(), std::size_t{1});
  pool.Unclaim(mixed, mixed_cold);
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(pool.num_warm(), 2);
}

TEST(BlockPoolTest, ABlockTakesThePlaceOfAnother) {
  BlockPool pool(4);
  Blocks taken, unused;
  EXPECT_TRUE(pool.Claim(1, -1, &taken, &unused));
  pool.AddReference(0);
  pool.SetCached(0);
  bool cold = false;
  EXPECT_FALSE(pool.ClaimBlock(0, &cold)) << "it is used";
  EXPECT_TRUE(pool.ClaimBlock(3, &cold));
  EXPECT_TRUE(cold);
  pool.Replace(0, 3, /*held=*/0);
  EXPECT_TRUE(pool.free(0) && !pool.free(3));
  EXPECT_EQ(pool.references(3), 2);
  EXPECT_TRUE(pool.cached(3) && !pool.cached(0));
  EXPECT_EQ(pool.num_used(), 1);
  EXPECT_EQ(pool.num_warm(), 1);
  EXPECT_TRUE(pool.ClaimBlock(0, &cold));
  EXPECT_FALSE(cold);
  pool.Replace(3, 0, /*held=*/2);
  EXPECT_EQ(pool.num_shared(), 2);
  EXPECT_EQ(pool.num_used(), 2);
  pool.Release(3);
  pool.Release(3);
  EXPECT_EQ(pool.num_shared(), 1);
  pool.CoolBlock(3);
  EXPECT_EQ(pool.num_warm(), 0);
}

TEST(BlockPoolTest, SharedBlocksAreFreedWithTheLastReference) {
  BlockPool pool(2);
  Blocks taken, cold;
  EXPECT_TRUE(pool.Claim(1, -1, &taken, &cold));
  pool.AddReference(taken[0]);
  EXPECT_EQ(pool.num_shared(), 1);
  pool.Release(taken[0]);
  EXPECT_EQ(pool.num_shared(), 0);
  EXPECT_EQ(pool.num_used(), 1);
  pool.Release(taken[0]);
  EXPECT_EQ(pool.num_used(), 0);
}

TEST(BlockPoolTest, WarmBlocksStayWithinAShrunkBudget) {
  BlockPool pool(8);
  Blocks taken, cold;
  EXPECT_TRUE(pool.Claim(8, -1, &taken, &cold));
  for (std::int32_t block = 7; block >= 2; --block) pool.Release(block);
  EXPECT_EQ(pool.Cool(4).size(), std::size_t{4});
  pool.SetBudget(4);
  EXPECT_EQ(pool.num_free(), 2);
  Blocks more, more_cold;
  EXPECT_TRUE(pool.Claim(2, 1, &more, &more_cold));  // 2 used + 2 warm fill the budget: no cold block may be created
  EXPECT_TRUE(more_cold.empty());
  EXPECT_FALSE(pool.Claim(1, -1, &more, &more_cold));
}

TEST(BlockPoolTest, ABlockIsCachedAsLongAsAnEntryRefersToIt) {
  BlockPool pool(4);
  std::vector<std::int32_t> blocks, cold;
  ASSERT_TRUE(pool.Claim(1, -1, &blocks, &cold));
  const std::int32_t block = blocks[0];
  pool.SetCached(block);
  pool.SetCached(block);
  EXPECT_EQ(pool.entries(block), 2);
  EXPECT_EQ(pool.num_cached(), 1);
  pool.Release(block);
  EXPECT_EQ(pool.num_detached(), 1);
  pool.DropCached(block);
  EXPECT_TRUE(pool.cached(block));
  EXPECT_EQ(pool.num_free(), 3);
  pool.AddReference(block);
  pool.DropCached(block);
  EXPECT_FALSE(pool.cached(block));
  EXPECT_EQ(pool.num_free(), 3);
  pool.Release(block);
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(pool.num_detached(), 0);
}

TEST(BlockPoolTest, RandomOperationsLoseNothing) {
  std::mt19937 random(7);
  BlockPool pool(64);
  std::set<std::int32_t> used;
  for (int i = 0; i < 20000; ++i) {
    const int action = static_cast<int>(random() % 4);
    if (action < 2) {
      Blocks taken, cold;
      const std::int64_t count = random() % 9;
      const bool fits = count <= 64 - static_cast<std::int64_t>(used.size());
      EXPECT_EQ(pool.Claim(count, static_cast<std::int32_t>(random() % 64), &taken, &cold), fits);
      for (std::int32_t block : taken) EXPECT_TRUE(used.insert(block).second) << "handed out twice: " << block;
    } else if (action == 2) {
      for (int n = static_cast<int>(random() % 12); n > 0 && !used.empty(); --n) {
        auto it = used.begin();
        std::advance(it, random() % used.size());
        pool.Release(*it);
        used.erase(it);
      }
    } else {
      static_cast<void>(pool.Cool(random() % 3));
    }
    EXPECT_EQ(pool.num_used(), static_cast<std::int64_t>(used.size()));
    EXPECT_LE(pool.num_used() + pool.num_warm(), pool.budget());
  }
}

}  // namespace
}  // namespace kvpage
