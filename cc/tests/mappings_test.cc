// Memory mappings: the worst case of a pool against what it really maps, and the account that all pools share.
#include "vmm/mappings.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"
#include "vmm/limits.h"

namespace kvpage::testing {
namespace {

constexpr std::int64_t kAllowed = 7000;  // of 8000, with a reserve of an eighth and no other mappings

MapAccount::Limits Plain() { return {8000, 0}; }

TEST(MappingsTest, TheWorstCaseIsBoundedByWhatCanBeMapped) {
  EXPECT_EQ(WorstMappings(100, 1000, 8), 201) << "each block alone in its range, with a hole behind it";
  EXPECT_EQ(WorstMappings(1000, 10, 200), 1011) << "a range ends in one hole";
  EXPECT_EQ(WorstMappings(1000, 10, 8), 91) << "more blocks than there is room for are never mapped";
  EXPECT_EQ(WorstMappings(0, 10, 8), 1);
  constexpr std::int64_t kHuge = INT64_MAX;
  EXPECT_GT(WorstMappings(kHuge, kHuge, kHuge), std::int64_t{1} << 60) << "no overflow";
}

TEST(MappingsTest, MostBlocksIsTheInverse) {
  for (std::int64_t ranges = 1; ranges < 40; ++ranges) {
    for (std::int64_t mappings = 0; mappings < 120; ++mappings) {
      const std::int64_t most = MostBlocks(mappings, ranges);
      if (most > 0) {
        EXPECT_LE(WorstMappings(most, ranges, 1000), mappings);
      }
      EXPECT_GT(WorstMappings(most + 1, ranges, 1000), mappings) << ranges << " " << mappings;
    }
  }
}

TEST(MappingsTest, APoolNeedsNoMoreThanItsWorstCase) {
  // Slots grow in turn, so that neighbouring blocks of a slot do not have neighbouring numbers.
  const Geometry geometry = SmallGeometry(Layout::kPerLayer);
  const std::int64_t ranges = geometry.num_ranges();
  const std::int64_t blocks = kSlots * ranges * 4;
  const auto of_pools = [] { return CurrentMapCounts().all - CurrentMapCounts().others; };
  const std::int64_t before = of_pools();
  const auto pool = MakePool(geometry, blocks);
  Program program(pool.get());
  std::vector<std::int32_t> slots;
  for (int i = 0; i < kSlots; ++i) slots.push_back(program.Acquire(1));
  for (std::int64_t tokens = 17; tokens <= 64; tokens += 16) {
    for (const std::int32_t slot : slots) EXPECT_OK(pool->Extend({slot}, {tokens}).status);
  }
  const std::int64_t worst = WorstMappings(blocks, kSlots * ranges, geometry.max_blocks());
  const std::int64_t used = of_pools() - before;  // excludes what the allocator, or a sanitizer's, maps meanwhile
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  constexpr std::int64_t kSlack = 16;  // sanitizers split mappings
#else
  constexpr std::int64_t kSlack = 0;
#endif
  EXPECT_LE(used, worst + kSlack);
  EXPECT_GE(used, worst - kSlots * ranges) << "the bound is not far off";
}

TEST(MappingsTest, PromisesAddUpAndAreGivenBack) {
  MapAccount account(&Plain);
  EXPECT_EQ(account.Left(), kAllowed);
  {
    MapPromise one(&account), two(&account);
    EXPECT_TRUE(one.Change(4000));
    EXPECT_FALSE(two.Change(3001));
    EXPECT_EQ(account.promised(), 4000) << "a refusal changes nothing";
    EXPECT_TRUE(two.Change(3000));
    EXPECT_EQ(account.Left(), 0);
    EXPECT_TRUE(one.Change(1000));
    EXPECT_EQ(two.Most(), 6000);
  }
  EXPECT_EQ(account.promised(), 0);
}

TEST(MappingsTest, RecentReadingsSufficeForHalfTheReserve) {
  static std::int64_t others = 0, readings = 0;
  others = readings = 0;
  MapAccount account([] {
    ++readings;
    return MapAccount::Limits{8000, others};
  });
  constexpr auto kRecent = MapAccount::Reading::kRecent;
  MapPromise promise(&account);
  EXPECT_TRUE(promise.Change(5000, kRecent));
  EXPECT_EQ(readings, 1) << "nothing was read before";
  others = 2000;  // now exactly as many are allowed as are promised
  EXPECT_TRUE(promise.Change(5200, kRecent));
  EXPECT_TRUE(promise.Change(5000, kRecent));
  EXPECT_TRUE(promise.Change(5300, kRecent));
  EXPECT_EQ(readings, 1);
  // 500 since the reading: one more would exceed a sixteenth of the limit, although some were given back.
  EXPECT_FALSE(promise.Change(5301, kRecent));
  EXPECT_EQ(readings, 2);
  EXPECT_EQ(promise.mappings(), 5300);
  others = 1000;
  EXPECT_TRUE(promise.Change(5301, kRecent)) << "the limits are read before a refusal";
  EXPECT_EQ(readings, 3);
  others = 3000;
  EXPECT_FALSE(promise.Change(5302)) << "a promise for a budget never stands on an old reading";
  EXPECT_EQ(account.promised(), 5301);
}

TEST(MappingsTest, SharesLeaveSomethingForPoolsToCome) {
  MapAccount account(&Plain);
  std::vector<std::unique_ptr<MapPromise>> promises;
  for (int i = 0; i < 8; ++i) {
    const std::int64_t share = account.Share();
    EXPECT_GE(share, 10) << i;
    promises.push_back(std::make_unique<MapPromise>(&account));
    EXPECT_TRUE(promises.back()->Change(share));
    EXPECT_GT(account.Left(), 0);
  }
}

TEST(MappingsTest, ThreadsAreNeverPromisedTooMany) {
  MapAccount account(&Plain);
  std::atomic<bool> too_many{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 2000; ++n) {
        MapPromise promise(&account);
        static_cast<void>(promise.Change(2500 + i));
        if (account.promised() > kAllowed) too_many = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(too_many);
  EXPECT_EQ(account.promised(), 0);
}

TEST(MappingsTest, PoolsDrawOnOneAccount) {
  MapAccount account([] { return MapAccount::Limits{64, 16}; });  // leaves 40
  const Geometry geometry = SmallGeometry();                      // 4 slots of one range and 8 blocks
  const auto make = [&](std::int64_t blocks, std::shared_ptr<Pool>* pool) {
    return Pool::Make(geometry, blocks * geometry.block_bytes, {}, MakeVmm(geometry), &account, pool);
  };
  std::shared_ptr<Pool> one, two;
  EXPECT_OK(make(20, &one));
  EXPECT_EQ(account.promised(), 25);
  const Status status = make(11, &two);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  for (const char* part : {"11 blocks of 4096 bytes may need 16 memory mappings, 15 are left", "allows this process 64",
                           "25 are reserved for its pools", "16 are used", "8 are kept", "block_tokens of at least 32",
                           "at most 40960 bytes", "vm.max_map_count"}) {
    EXPECT_TRUE(Mentions(status, part)) << part << " | " << status.message();
  }
  EXPECT_EQ(account.promised(), 25);
  EXPECT_OK(make(10, &two));

  // A resize is accounted for too, and changes nothing if it fails.
  EXPECT_EQ(one->Resize(21 * geometry.block_bytes).status.code(), Code::kInvalidArgument);
  EXPECT_EQ(account.promised(), 40);
  EXPECT_OK(one->Resize(10 * geometry.block_bytes).status);
  EXPECT_EQ(account.promised(), 30);
  EXPECT_OK(two->Acquire({128}).status);
  EXPECT_EQ(two->Resize(7 * geometry.block_bytes).status.code(), Code::kResourceExhausted);
  EXPECT_EQ(account.promised(), 30);
  two.reset();
  EXPECT_EQ(account.promised(), 15);
}

}  // namespace
}  // namespace kvpage::testing
