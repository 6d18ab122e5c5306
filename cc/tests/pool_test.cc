// The pool's state machine over real mappings: claims, releases, adoption, pressure, generations, stale caches.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

TEST(PoolTest, GrowsByWholeBlocks) {
  auto pool = MakePool(SmallGeometry(), 16);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(1);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 1);
  const std::int64_t calls = pool->Numbers().system_calls;
  EXPECT_OK(pool->Extend({slot}, {16}).status);
  EXPECT_EQ(pool->Numbers().system_calls, calls) << "room in the last block needs no call";
  EXPECT_OK(pool->Extend({slot}, {17}).status);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 2);
  bool ok = false;
  EXPECT_OK(program.Map(slot, 100, &ok));
  EXPECT_TRUE(ok);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 7);
}

TEST(PoolTest, PerLayerGrowsEveryRange) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 32);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(17);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 8);
  std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> map;
  EXPECT_OK(pool->BlockMap(slot, &map));
  EXPECT_EQ(map.size(), std::size_t{4});
  EXPECT_EQ(map[3].size(), std::size_t{2});
}

TEST(PoolTest, ScalesLieBehindTheirBlocksData) {
  constexpr int kHeads = 3, kDim = 10, kTokens = 16, kLayers = 2;
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const DType dtype : {DType::kI8, DType::kF8E4M3}) {
      Geometry g;
      EXPECT_OK(Geometry::Make({kLayers, kHeads, kDim, kSlots, 40, static_cast<std::int64_t>(dtype),
                                static_cast<std::int64_t>(layout), kTokens},
                               4096, &g));
      EXPECT_EQ(g.token_bytes(), 2 * kLayers * kHeads * (kDim + 4));
      auto pool = MakePool(g, 16);
      Program program(pool.get());
      const std::int32_t slot = program.Acquire(20);
      const KVView view = pool->View();
      // No two elements or scales share a byte, and the parts of a block fill its first bytes.
      std::vector<int> used(g.slot_bytes());
      int wrong = 0;
      for (int t = 0; t < 20; ++t) {
        for (int i = 0; i < kLayers * 2 * kHeads; ++i) {
          const int layer = i / 2 / kHeads, kv = i / kHeads % 2, head = i % kHeads;
          const int range = layout == Layout::kFused ? 0 : 2 * layer + kv;
          const char* block = view.base + g.Offset(slot, range, t / kTokens);
          const auto mark = [&](const char* p, int bytes) {
            const std::int64_t at = p - block;
            wrong += at < 0 || at + bytes > kTokens * g.token_bytes() / g.num_ranges();
            for (int k = 0; k < bytes; ++k) wrong += used[range * g.range_bytes() + t / kTokens * 4096 + at + k]++ != 0;
          };
          mark(view.At(slot, t, layer, kv, head), kDim);
          mark(reinterpret_cast<char*>(view.Scale(slot, t, layer, kv, head)), 4);
          wrong += reinterpret_cast<std::uintptr_t>(view.Scale(slot, t, layer, kv, head)) % alignof(float) != 0;
        }
      }
      EXPECT_EQ(wrong, 0) << static_cast<int>(layout);
      Geometry small;
      EXPECT_FALSE(Geometry::Make(g.spec(), kTokens * g.token_bytes() / g.num_ranges() - 1, &small).ok());
    }
  }
}

TEST(PoolTest, HolesReadAsZerosAndMappedMemoryHolds) {
  auto pool = MakePool(SmallGeometry(), 16);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const KVView view = pool->View();
  std::memset(view.At(slot, 3, 1, 1, 0), 7, 64);
  EXPECT_EQ(static_cast<int>(*view.At(slot, 3, 1, 1, 0)), 7);
  if (kHolesAreReadable) {
    EXPECT_EQ(static_cast<int>(*view.At(slot, 100, 1, 1, 0)), 0);
  }
}

TEST(PoolTest, ParkedSlotThatFitsBestIsAdoptedWithoutCalls) {
  auto pool = MakePool(SmallGeometry(), 32);
  Program program(pool.get());
  const std::int32_t big = program.Acquire(100);
  const std::int32_t middle = program.Acquire(40);
  const std::int32_t small = program.Acquire(10);
  for (std::int32_t slot : {big, middle, small}) program.Release(slot);
  EXPECT_EQ(pool->Numbers().blocks_parked, 7 + 3 + 1);
  const std::int64_t calls = pool->Numbers().system_calls;
  EXPECT_EQ(program.Acquire(33), middle);
  EXPECT_EQ(program.Acquire(16), small);
  EXPECT_EQ(program.Acquire(48), big);
  EXPECT_EQ(pool->Numbers().system_calls, calls);
}

TEST(PoolTest, PressureTakesParkedBlocksThenTails) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t first = program.Acquire(64);
  const std::int32_t second = program.Acquire(64);
  program.Release(first);
  // Would adopt 4 blocks, but 4 more are not available.
  EXPECT_EQ(pool->Acquire({128}).status.code(), Code::kResourceExhausted);
  program.Release(second);
  const std::int32_t fourth = program.Acquire(128);
  EXPECT_GE(fourth, 0);
  EXPECT_EQ(pool->Numbers().blocks_mapped, 8);
  program.Release(fourth);
  const std::int32_t fifth = program.Acquire(16);  // adopts all 8, though it asks for 1
  const std::int32_t sixth = program.Acquire(112);
  EXPECT_TRUE(fifth >= 0 && sixth >= 0);
  EXPECT_EQ(pool->Numbers().blocks_free, 0);
}

TEST(PoolTest, ShortageSaysTheNumbersAndChangesNothing) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(32);
  const PoolNumbers before = pool->Numbers();
  const Claim claim = pool->Acquire({16, 64});
  EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
  EXPECT_EQ(claim.wanted, 5);
  EXPECT_EQ(claim.free, 2);
  EXPECT_EQ(pool->Numbers().blocks_mapped, before.blocks_mapped);
  EXPECT_EQ(pool->Numbers().slots_occupied, 1);
  bool ok = true;
  EXPECT_OK(program.Map(slot, 100, &ok));
  EXPECT_FALSE(ok);
  EXPECT_OK(program.Map(slot, 64, &ok));
  EXPECT_TRUE(ok);
}

TEST(PoolTest, DrainingIsNeverHandedOut) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  EXPECT_OK(StartRelease(*pool, {slot}));
  const Claim claim = pool->Acquire({16});
  EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
  EXPECT_EQ(claim.draining, 4);
  EXPECT_OK(program.Vacate(slot));
  EXPECT_EQ(pool->Numbers().blocks_parked, 4);
  EXPECT_OK(pool->Acquire({16}).status);
}

TEST(PoolTest, AReaderKeepsItsSlotDraining) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_OK(program.Write(slot, 3));
  {
    EXPECT_OK(program.Write(slot, 1));
    EXPECT_OK(program.SetLength(slot, 3));
    PinnedSlots pinned;
    EXPECT_OK(program.Begin(slot, 1, 0, true, &pinned));
    program.SetEpoch(pinned.epoch());
    program.Release(slot);
    EXPECT_EQ(pool->Numbers().slots_draining, 1) << "a handler is still at work on it";
  }
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_EQ(pool->Numbers().slots_parked, 1);
}

TEST(PoolTest, AStepThatEndsDoesNotEndTheDraining) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  {
    PinnedSlots pinned;
    EXPECT_OK(program.Begin(slot, 1, 0, true, &pinned));
    program.SetEpoch(pinned.epoch());
    EXPECT_OK(StartRelease(*pool, {slot}));
  }
  EXPECT_EQ(pool->Numbers().slots_draining, 1) << "programs queued before the release may still come";
  EXPECT_OK(program.Vacate(slot));
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
}

TEST(PoolTest, StaleCachesAreRefused) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const Program old = program;
  EXPECT_OK(program.Write(slot, 2));
  Program stale = old;
  const Status status = stale.Write(slot, 1);
  EXPECT_EQ(status.code(), Code::kFailedPrecondition);
  EXPECT_TRUE(Mentions(status, "stale cache")) << status.message();
  Program reader = old;  // may read positions that are still there
  PinnedSlots pinned;
  EXPECT_OK(reader.Begin(slot, 1, 0, false, &pinned));
}

TEST(PoolTest, ADestructiveChangeStopsOldReaders) {
  auto pool = MakePool(SmallGeometry(), 8, {/*allow_stale=*/true, false});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_OK(program.Write(slot, 2));
  Program old = program;
  EXPECT_OK(program.SetLength(slot, 1));
  PinnedSlots pinned;
  EXPECT_TRUE(Mentions(old.Begin(slot, 1, 0, true, &pinned), "rolled back"));
}

TEST(PoolTest, AStepMayBeRepeatedWhenAllowed) {
  auto pool = MakePool(SmallGeometry(), 8, {/*allow_stale=*/true, false});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  for (int i = 0; i < 3; ++i) {
    Program copy = program;
    EXPECT_OK(copy.Write(slot, 2));
    EXPECT_EQ(copy.length(slot), 2);
  }
}

TEST(PoolTest, BadBatchesAreRefusedByName) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const auto begin = [&](std::vector<std::int32_t> slots, std::vector<std::int32_t> offsets, std::int64_t tokens,
                         std::int64_t layer = 0) {
    PinnedSlots pinned;
    return pool->Begin("append_kv", program.cache(),
                       {slots.data(), static_cast<std::int64_t>(slots.size()), offsets.data(), tokens}, layer, true,
                       &pinned);
  };
  EXPECT_TRUE(Mentions(begin({slot}, {1, 2}, 2), "wanted 0"));
  EXPECT_TRUE(Mentions(begin({slot, -1}, {0, 2, 1}, 2), "must not decrease"));
  EXPECT_TRUE(Mentions(begin({slot}, {0, 3}, 2), "there are 2 tokens"));
  EXPECT_TRUE(Mentions(begin({slot, slot}, {0, 1, 2}, 2), "named twice"));
  EXPECT_TRUE(Mentions(begin({kSlots}, {0, 1}, 1), "does not exist"));
  EXPECT_TRUE(Mentions(begin({-2}, {0, 1}, 1), "does not exist"));
  EXPECT_TRUE(Mentions(begin({slot == 0 ? 1 : 0}, {0, 1}, 1), "is free in this cache"));
  EXPECT_TRUE(Mentions(begin({slot}, {0, 17}, 17), "16 mapped"));
  EXPECT_TRUE(Mentions(begin({slot}, {0, 200}, 200), "max_seq_len is 128"));
  EXPECT_TRUE(Mentions(begin({slot}, {0, 1}, 1, 2), "layer is 2"));
  EXPECT_OK(begin({-1, slot}, {0, 1, 2}, 5));
}

TEST(PoolTest, ANewGenerationRestoresLengths) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t kept = program.Acquire(32);
  const std::int32_t gone = program.Acquire(16);
  EXPECT_OK(program.Write(kept, 5));
  EXPECT_OK(StartRelease(*pool, {gone}));  // its program never runs
  const Program old = program;
  program.Restart();
  EXPECT_EQ(program.length(kept), 5);
  EXPECT_EQ(program.length(gone), -1);
  EXPECT_EQ(pool->Numbers().slots_draining, 0);
  EXPECT_OK(program.Write(kept, 1));
  Program stale = old;
  EXPECT_TRUE(Mentions(stale.Write(kept, 1), "belongs to generation 1"));
}

TEST(PoolTest, TrimAndResizeGiveMemoryBack) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(128);
  EXPECT_EQ(pool->Numbers().physical_bytes, 8 * 4096);
  program.Release(slot);
  EXPECT_EQ(pool->Numbers().physical_bytes, 8 * 4096);
  std::int64_t freed = 0;
  EXPECT_OK(pool->Trim(&freed));
  EXPECT_EQ(freed, 8);
  EXPECT_EQ(pool->Numbers().physical_bytes, 0);
  const std::int32_t other = program.Acquire(48);
  EXPECT_OK(program.Write(other, 40));
  EXPECT_EQ(pool->Resize(2 * 4096).status.code(), Code::kResourceExhausted);
  EXPECT_OK(pool->Resize(3 * 4096).status);
  EXPECT_EQ(pool->Acquire({1}).status.code(), Code::kResourceExhausted);
  EXPECT_OK(pool->Resize(64 * 4096).status);
  EXPECT_OK(pool->Acquire({100}).status);
}

TEST(PoolTest, ClosedPoolsRefuse) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  pool->Close();
  pool->Close();
  EXPECT_TRUE(Mentions(program.Write(slot, 1), "is closed"));
  EXPECT_TRUE(Mentions(pool->Acquire({1}).status, "is closed"));
}

TEST(PoolTest, EpochsMayWrap) {
  EXPECT_TRUE(Before(0xfffffffeu, 1u));
  EXPECT_FALSE(Before(1u, 0xfffffffeu));
  EXPECT_FALSE(Before(5u, 5u));
}

TEST(PoolTest, PoisonAndViewsDecideWhatNewMemoryHolds) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 32, {false, /*poison=*/true});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_EQ(static_cast<int>(static_cast<unsigned char>(*pool->View().At(slot, 5, 0, 0, 0))), 0xff);
  EXPECT_OK(program.Write(slot, 2));
  EXPECT_OK(pool->AddView(0, slot));
  EXPECT_EQ(static_cast<int>(*pool->View().At(slot, 5, 0, 0, 0)), 0) << "unwritten memory under a view reads as zeros";
  EXPECT_EQ(static_cast<int>(static_cast<unsigned char>(*pool->View().At(slot, 1, 0, 0, 0))), 0xff)
      << "written: untouched";
  program.Release(slot);
  EXPECT_EQ(pool->Numbers().slots_draining, 1) << "a view holds it";
  pool->RemoveView(slot);
  EXPECT_EQ(pool->Numbers().slots_parked, 1);
}

}  // namespace
}  // namespace kvpage::testing
