// The pool's state machine over real mappings: claims, releases, adoption, pressure, generations, stale caches.
#include <cstring>

#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

TEST(GrowsByWholeBlocks) {
  auto pool = MakePool(SmallGeometry(), 16);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(1);
  CHECK_EQ(pool->Numbers().blocks_mapped, 1);
  const std::int64_t calls = pool->Numbers().system_calls;
  CHECK_OK(pool->Extend({slot}, {16}).status);
  CHECK_EQ(pool->Numbers().system_calls, calls) << "room in the last block needs no call";
  CHECK_OK(pool->Extend({slot}, {17}).status);
  CHECK_EQ(pool->Numbers().blocks_mapped, 2);
  bool ok = false;
  CHECK_OK(program.Map(slot, 100, &ok));
  CHECK(ok);
  CHECK_EQ(pool->Numbers().blocks_mapped, 7);
}

TEST(PerLayerGrowsEveryRange) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 32);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(17);
  CHECK_EQ(pool->Numbers().blocks_mapped, 8);
  std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> map;
  CHECK_OK(pool->BlockMap(slot, &map));
  CHECK_EQ(map.size(), std::size_t{4});
  CHECK_EQ(map[3].size(), std::size_t{2});
}

TEST(ScalesLieBehindTheirBlocksData) {
  constexpr int kHeads = 3, kDim = 10, kTokens = 16, kLayers = 2;
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const DType dtype : {DType::kI8, DType::kF8E4M3}) {
      Geometry g;
      CHECK_OK(Geometry::Make({kLayers, kHeads, kDim, kSlots, 40, static_cast<std::int64_t>(dtype),
                               static_cast<std::int64_t>(layout), kTokens},
                              4096, &g));
      CHECK_EQ(g.token_bytes(), 2 * kLayers * kHeads * (kDim + 4));
      auto pool = MakePool(g, 16);
      Program program(pool.get());
      const std::int32_t slot = program.Acquire(20);
      const KVView view = pool->View();
      // No two elements or scales share a byte, and each part of a block fills its first bytes.
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
      CHECK_EQ(wrong, 0) << static_cast<int>(layout);
      Geometry small;
      CHECK(!Geometry::Make(g.spec(), kTokens * g.token_bytes() / g.num_ranges() - 1, &small).ok());
    }
  }
}

TEST(HolesReadAsZerosAndMappedMemoryHolds) {
  auto pool = MakePool(SmallGeometry(), 16);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const KVView view = pool->View();
  std::memset(view.At(slot, 3, 1, 1, 0), 7, 64);
  CHECK_EQ(static_cast<int>(*view.At(slot, 3, 1, 1, 0)), 7);
  if (kHolesAreReadable) {
    CHECK_EQ(static_cast<int>(*view.At(slot, 100, 1, 1, 0)), 0);
  }
}

TEST(ParkedSlotThatFitsBestIsAdoptedWithoutCalls) {
  auto pool = MakePool(SmallGeometry(), 32);
  Program program(pool.get());
  const std::int32_t big = program.Acquire(100);
  const std::int32_t middle = program.Acquire(40);
  const std::int32_t small = program.Acquire(10);
  for (std::int32_t slot : {big, middle, small}) program.Release(slot);
  CHECK_EQ(pool->Numbers().blocks_parked, 7 + 3 + 1);
  const std::int64_t calls = pool->Numbers().system_calls;
  CHECK_EQ(program.Acquire(33), middle);
  CHECK_EQ(program.Acquire(16), small);
  CHECK_EQ(program.Acquire(48), big);
  CHECK_EQ(pool->Numbers().system_calls, calls);
}

TEST(PressureTakesParkedBlocksThenTails) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t first = program.Acquire(64);
  const std::int32_t second = program.Acquire(64);
  program.Release(first);
  // Adopts 4 blocks; 4 more are not to be had.
  CHECK(pool->Acquire({128}).status.code() == Code::kResourceExhausted);
  program.Release(second);
  const std::int32_t fourth = program.Acquire(128);
  CHECK(fourth >= 0);
  CHECK_EQ(pool->Numbers().blocks_mapped, 8);
  program.Release(fourth);
  const std::int32_t fifth = program.Acquire(16);  // adopts all 8, asked for 1
  const std::int32_t sixth = program.Acquire(112);
  CHECK(fifth >= 0 && sixth >= 0);
  CHECK_EQ(pool->Numbers().blocks_free, 0);
}

TEST(ShortageSaysTheNumbersAndChangesNothing) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(32);
  const PoolNumbers before = pool->Numbers();
  const Claim claim = pool->Acquire({16, 64});
  CHECK(claim.status.code() == Code::kResourceExhausted);
  CHECK_EQ(claim.wanted, 5);
  CHECK_EQ(claim.free, 2);
  CHECK_EQ(pool->Numbers().blocks_mapped, before.blocks_mapped);
  CHECK_EQ(pool->Numbers().slots_occupied, 1);
  bool ok = true;
  CHECK_OK(program.Map(slot, 100, &ok));
  CHECK(!ok);
  CHECK_OK(program.Map(slot, 64, &ok));
  CHECK(ok);
}

TEST(DrainingIsNeverHandedOut) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  CHECK_OK(pool->StartRelease({slot}));
  const Claim claim = pool->Acquire({16});
  CHECK(claim.status.code() == Code::kResourceExhausted);
  CHECK_EQ(claim.draining, 4);
  CHECK_OK(program.Vacate(slot));
  CHECK_EQ(pool->Numbers().blocks_parked, 4);
  CHECK_OK(pool->Acquire({16}).status);
}

TEST(AReaderKeepsItsSlotDraining) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  CHECK_OK(program.Write(slot, 3));
  {
    CHECK_OK(program.Write(slot, 1));
    CHECK_OK(program.SetLength(slot, 3));
    PinnedSlots pinned;
    CHECK_OK(program.Begin(slot, 1, 0, true, &pinned));
    program.SetEpoch(pinned.epoch());
    program.Release(slot);
    CHECK_EQ(pool->Numbers().slots_draining, 1) << "a handler is still at work on it";
  }
  CHECK_EQ(pool->Numbers().slots_draining, 0);
  CHECK_EQ(pool->Numbers().slots_parked, 1);
}

TEST(AStepThatEndsDoesNotEndTheDraining) {
  auto pool = MakePool(SmallGeometry(), 4);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  {
    PinnedSlots pinned;
    CHECK_OK(program.Begin(slot, 1, 0, true, &pinned));
    program.SetEpoch(pinned.epoch());
    CHECK_OK(pool->StartRelease({slot}));
  }
  CHECK_EQ(pool->Numbers().slots_draining, 1) << "programs queued before the release may still come";
  CHECK_OK(program.Vacate(slot));
  CHECK_EQ(pool->Numbers().slots_draining, 0);
}

TEST(StaleCachesAreRefused) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  const Program old = program;
  CHECK_OK(program.Write(slot, 2));
  Program stale = old;
  const Status status = stale.Write(slot, 1);
  CHECK(status.code() == Code::kFailedPrecondition);
  CHECK(Mentions(status, "stale cache")) << status.message();
  Program reader = old;  // reads of positions that are still there are fine
  PinnedSlots pinned;
  CHECK_OK(reader.Begin(slot, 1, 0, false, &pinned));
}

TEST(ADestructiveChangeStopsOldReaders) {
  auto pool = MakePool(SmallGeometry(), 8, {/*allow_stale=*/true, false});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  CHECK_OK(program.Write(slot, 2));
  Program old = program;
  CHECK_OK(program.SetLength(slot, 1));
  PinnedSlots pinned;
  CHECK(Mentions(old.Begin(slot, 1, 0, true, &pinned), "rolled back"));
}

TEST(AStepMayBeRepeatedWhenAllowed) {
  auto pool = MakePool(SmallGeometry(), 8, {/*allow_stale=*/true, false});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  for (int i = 0; i < 3; ++i) {
    Program copy = program;
    CHECK_OK(copy.Write(slot, 2));
    CHECK_EQ(copy.length(slot), 2);
  }
}

TEST(NobodyReadsWhatWasNotWritten) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  PinnedSlots pinned;
  CHECK(Mentions(program.Begin(slot, 1, 0, false, &pinned), "0 written"));
  const std::int32_t offsets[] = {0, 1};
  std::uint32_t epoch = 0;
  std::int32_t lengths[kSlots];
  CHECK(Mentions(pool->Advance("advance", program.cache(), {&slot, 1, offsets, -1}, &epoch, lengths),
                 "written in every"));
}

TEST(BadBatchesAreRefusedByName) {
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
  CHECK(Mentions(begin({slot}, {1, 2}, 2), "wanted 0"));
  CHECK(Mentions(begin({slot, -1}, {0, 2, 1}, 2), "must not decrease"));
  CHECK(Mentions(begin({slot}, {0, 3}, 2), "there are 2 tokens"));
  CHECK(Mentions(begin({slot, slot}, {0, 1, 2}, 2), "named twice"));
  CHECK(Mentions(begin({kSlots}, {0, 1}, 1), "does not exist"));
  CHECK(Mentions(begin({-2}, {0, 1}, 1), "does not exist"));
  CHECK(Mentions(begin({slot == 0 ? 1 : 0}, {0, 1}, 1), "is free in this cache"));
  CHECK(Mentions(begin({slot}, {0, 17}, 17), "16 mapped"));
  CHECK(Mentions(begin({slot}, {0, 200}, 200), "max_seq_len is 128"));
  CHECK(Mentions(begin({slot}, {0, 1}, 1, 2), "layer is 2"));
  CHECK_OK(begin({-1, slot}, {0, 1, 2}, 5));
}

TEST(ANewLineRestoresLengths) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t kept = program.Acquire(32);
  const std::int32_t gone = program.Acquire(16);
  CHECK_OK(program.Write(kept, 5));
  CHECK_OK(pool->StartRelease({gone}));  // its program never runs
  const Program old = program;
  program.Restart();
  CHECK_EQ(program.length(kept), 5);
  CHECK_EQ(program.length(gone), -1);
  CHECK_EQ(pool->Numbers().slots_draining, 0);
  CHECK_OK(program.Write(kept, 1));
  Program stale = old;
  CHECK(Mentions(stale.Write(kept, 1), "belongs to generation 1"));
}

TEST(TrimAndResizeGiveMemoryBack) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(128);
  CHECK_EQ(pool->Numbers().physical_bytes, 8 * 4096);
  program.Release(slot);
  CHECK_EQ(pool->Numbers().physical_bytes, 8 * 4096);
  std::int64_t freed = 0;
  CHECK_OK(pool->Trim(&freed));
  CHECK_EQ(freed, 8);
  CHECK_EQ(pool->Numbers().physical_bytes, 0);
  const std::int32_t other = program.Acquire(48);
  CHECK_OK(program.Write(other, 40));
  CHECK(pool->Resize(2 * 4096).status.code() == Code::kResourceExhausted);
  CHECK_OK(pool->Resize(3 * 4096).status);
  CHECK(pool->Acquire({1}).status.code() == Code::kResourceExhausted);
  CHECK_OK(pool->Resize(64 * 4096).status);
  CHECK_OK(pool->Acquire({100}).status);
}

TEST(ClosedPoolsRefuse) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  pool->Close();
  pool->Close();
  CHECK(Mentions(program.Write(slot, 1), "is closed"));
  CHECK(Mentions(pool->Acquire({1}).status, "is closed"));
}

TEST(EpochsMayWrap) {
  CHECK(Before(0xfffffffeu, 1u));
  CHECK(!Before(1u, 0xfffffffeu));
  CHECK(!Before(5u, 5u));
}

TEST(PoisonAndViewsDecideWhatNewMemoryHolds) {
  auto pool = MakePool(SmallGeometry(Layout::kPerLayer), 32, {false, /*poison=*/true});
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  CHECK_EQ(static_cast<int>(static_cast<unsigned char>(*pool->View().At(slot, 5, 0, 0, 0))), 0xff);
  CHECK_OK(program.Write(slot, 2));
  CHECK_OK(pool->AddView(0, slot));
  CHECK_EQ(static_cast<int>(*pool->View().At(slot, 5, 0, 0, 0)), 0) << "unwritten memory under a view reads as zeros";
  CHECK_EQ(static_cast<int>(static_cast<unsigned char>(*pool->View().At(slot, 1, 0, 0, 0))), 0xff)
      << "written: untouched";
  program.Release(slot);
  CHECK_EQ(pool->Numbers().slots_draining, 1) << "a view holds it";
  pool->RemoveView(slot);
  CHECK_EQ(pool->Numbers().slots_parked, 1);
}

}  // namespace
}  // namespace kvpage::testing

int main(int argc, char** argv) { return kvpage::testing::RunPoolTests(argc, argv); }
