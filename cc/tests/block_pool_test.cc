// The block pool's bookkeeping.
#include "cache/block_pool.h"

#include <random>
#include <set>
#include <vector>

#include "tests/check.h"

namespace kvpage {
namespace {

using Blocks = std::vector<std::int32_t>;

TEST(ClaimsNeighbours) {
  BlockPool pool(8);
  Blocks first, second, cold;
  CHECK(pool.Claim(3, -1, &first, &cold));
  CHECK((first == Blocks{0, 1, 2}));
  CHECK(cold == first);
  CHECK(pool.Claim(1, 5, &second, &cold));
  CHECK((second == Blocks{6}));
}

TEST(ClaimIsAllOrNothing) {
  BlockPool pool(4);
  Blocks taken, cold;
  CHECK(pool.Claim(3, -1, &taken, &cold));
  Blocks more, more_cold;
  CHECK(!pool.Claim(2, -1, &more, &more_cold));
  CHECK(more.empty() && more_cold.empty());
  CHECK_EQ(pool.num_free(), 1);
}

TEST(UnclaimRemembersWhatWasCold) {
  BlockPool pool(4);
  Blocks warm, cold;
  CHECK(pool.Claim(2, -1, &warm, &cold));
  for (std::int32_t block : warm) pool.Release(block);
  CHECK_EQ(pool.num_warm(), 2);
  Blocks mixed, mixed_cold;
  CHECK(pool.Claim(3, -1, &mixed, &mixed_cold));
  CHECK_EQ(mixed_cold.size(), std::size_t{1});
  pool.Unclaim(mixed, mixed_cold);
  CHECK_EQ(pool.num_used(), 0);
  CHECK_EQ(pool.num_warm(), 2);
}

TEST(SharedBlocksAreFreedWithTheLastReference) {
  BlockPool pool(2);
  Blocks taken, cold;
  CHECK(pool.Claim(1, -1, &taken, &cold));
  pool.AddReference(taken[0]);
  CHECK_EQ(pool.num_shared(), 1);
  pool.Release(taken[0]);
  CHECK_EQ(pool.num_shared(), 0);
  CHECK_EQ(pool.num_used(), 1);
  pool.Release(taken[0]);
  CHECK_EQ(pool.num_used(), 0);
}

TEST(WarmBlocksStayWithinAShrunkBudget) {
  BlockPool pool(8);
  Blocks taken, cold;
  CHECK(pool.Claim(8, -1, &taken, &cold));
  for (std::int32_t block = 7; block >= 2; --block) pool.Release(block);
  CHECK_EQ(pool.Cool(4).size(), std::size_t{4});
  pool.SetBudget(4);
  CHECK_EQ(pool.num_free(), 2);
  Blocks more, more_cold;
  CHECK(pool.Claim(2, 1, &more, &more_cold));  // 2 used + 2 warm fill the budget: no cold one may be created
  CHECK(more_cold.empty());
  CHECK(!pool.Claim(1, -1, &more, &more_cold));
}

TEST(RandomOperationsLoseNothing) {
  std::mt19937 random(7);
  BlockPool pool(64);
  std::set<std::int32_t> used;
  for (int i = 0; i < 20000; ++i) {
    const int action = static_cast<int>(random() % 4);
    if (action < 2) {
      Blocks taken, cold;
      const std::int64_t count = random() % 9;
      const bool fits = count <= 64 - static_cast<std::int64_t>(used.size());
      CHECK_EQ(pool.Claim(count, static_cast<std::int32_t>(random() % 64), &taken, &cold), fits);
      for (std::int32_t block : taken) CHECK(used.insert(block).second) << "handed out twice:" << block;
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
    CHECK_EQ(pool.num_used(), static_cast<std::int64_t>(used.size()));
    CHECK(pool.num_used() + pool.num_warm() <= pool.budget());
  }
}

}  // namespace
}  // namespace kvpage

int main(int argc, char** argv) { return kvpage::testing::RunAll(argc, argv); }
