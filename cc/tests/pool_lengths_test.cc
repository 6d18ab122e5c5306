// How far the pool trusts the lengths in a cache: no further than what the slot's occupant has written.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {

TEST(PoolLengthsTest, NobodyReadsWhatWasNotWritten) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  PinnedSlots pinned;
  EXPECT_TRUE(Mentions(program.Begin(slot, 1, 0, false, &pinned), "0 written"));
  const std::int32_t offsets[] = {0, 1};
  std::uint32_t epoch = 0;
  std::int32_t lengths[kSlots];
  EXPECT_TRUE(Mentions(pool->Advance("advance", program.cache(), {&slot, 1, offsets, -1}, &epoch, lengths),
                       "1 tokens wanted, written in layers 0..1: 0; append_kv"));
}

// Lengths are part of the cache value, which a program may change: lengths beyond the pool's own record are refused.
TEST(PoolLengthsTest, LengthsBeyondWhatWasWrittenAreRefused) {
  for (const bool allow_stale : {false, true}) {
    auto pool = MakePool(SmallGeometry(), 8, {allow_stale, false});
    Program program(pool.get());
    const std::int32_t first = program.Acquire(64);
    EXPECT_OK(program.Write(first, 40));
    program.Release(first);
    const std::int32_t slot = program.Acquire(64);
    EXPECT_EQ(slot, first);  // with the memory that holds the first request's tokens
    EXPECT_OK(program.Write(slot, 3));
    std::vector<std::int32_t> lengths(program.cache().lengths, program.cache().lengths + kSlots);
    std::vector<std::int32_t> out(kSlots);
    CacheRef cache = program.cache();
    cache.lengths = lengths.data();
    std::uint32_t epoch = 0;
    const std::int32_t one[] = {0, 1};
    for (const std::int32_t length : {4, 40}) {
      lengths[slot] = length;
      const std::string number = std::to_string(length);
      for (const bool append : {true, false}) {
        PinnedSlots pinned;
        EXPECT_TRUE(Mentions(pool->Begin("op", cache, {&slot, 1, one, 1}, 1, append, &pinned), "3 written"));
      }
      EXPECT_TRUE(
          Mentions(pool->Advance("advance", cache, {&slot, 1, one, -1}, &epoch, out.data()), " tokens wanted, "));
      const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kSetLength), slot, length};
      EXPECT_TRUE(Mentions(EditOne(pool.get(), "release", cache, edit, &epoch, out.data()), number + " tokens wanted"));
      EXPECT_TRUE(Mentions(pool->SetLengths("set_lengths", cache, &slot, &length, 1, &epoch, out.data()),
                           number + " tokens wanted"));
    }
    // A free slot does not become occupied because the cache says so.
    const std::int32_t nobodys = slot == 0 ? 1 : 0;
    lengths[slot] = 3;
    lengths[nobodys] = 0;
    const std::int32_t tokens = 16;
    bool ok = false;
    EXPECT_TRUE(Mentions(pool->MapSlots("map_slots", cache, &nobodys, &tokens, 1, &ok, &epoch), "is free"));
    PinnedSlots pinned;
    EXPECT_TRUE(Mentions(pool->Begin("op", cache, {&nobodys, 1, one, 1}, 1, true, &pinned), "0 mapped"));
    program.Restart();
    EXPECT_EQ(program.length(slot), 3);
    EXPECT_OK(program.Write(slot, 2));
  }
}

TEST(PoolLengthsTest, SumsOfTokensDoNotOverflow) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  EXPECT_OK(program.Write(slot, 5));
  const std::int32_t offsets[] = {0, std::numeric_limits<std::int32_t>::max()};
  std::vector<std::int32_t> out(kSlots);
  std::uint32_t epoch = 0;
  EXPECT_TRUE(Mentions(pool->Advance("advance", program.cache(), {&slot, 1, offsets, -1}, &epoch, out.data()),
                       "2147483652 tokens wanted"));
  PinnedSlots pinned;
  EXPECT_TRUE(Mentions(pool->Begin("append_kv", program.cache(), {&slot, 1, offsets, -1}, 0, true, &pinned),
                       "2147483652 tokens wanted, max_seq_len is 128"));
  EXPECT_OK(program.Write(slot, 5));  // the slot is unchanged
  EXPECT_EQ(program.length(slot), 10);
}

TEST(PoolLengthsTest, AdvanceSaysWhichLayersAreWritten) {
  Geometry geometry;
  EXPECT_OK(Geometry::Make({8, 1, 16, kSlots, 128, 0, 0, 16}, 4 * 4096, &geometry));
  auto pool = MakePool(geometry, 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(64);
  EXPECT_OK(program.Write(slot, 5));
  const std::int32_t three[] = {0, 3};
  std::vector<std::int32_t> out(kSlots);
  const auto advance = [&] {
    std::uint32_t epoch = 0;
    return pool->Advance("advance", program.cache(), {&slot, 1, three, -1}, &epoch, out.data());
  };
  const auto append = [&](std::int64_t layer) {
    PinnedSlots pinned;
    EXPECT_OK(program.Begin(slot, 3, layer, true, &pinned));
    program.SetEpoch(pinned.epoch());
  };
  for (const std::int64_t layer : {0, 1, 2, 2, 4, 5, 6, 7}) append(layer);  // one layer twice instead of the next one
  EXPECT_TRUE(
      Mentions(advance(), ": 8 tokens wanted, written in layers 0..2: 8, layer 3: 5, layers 4..7: 8; append_kv"));
  program.Restart();
  for (const std::int64_t layer : {0, 2, 4, 6}) append(layer);
  EXPECT_TRUE(Mentions(advance(), "written in layer 0: 8, layer 1: 5, layer 2: 8, layer 3: 5, ...; append_kv"));
}

// If another device's pool fails, an extend and a commit that this pool has made are taken back.
TEST(PoolLengthsTest, RetractTakesRoomAndTokensBack) {
  auto pool = MakePool(SmallGeometry(), 8);
  Program program(pool.get());
  const std::int32_t slot = program.Acquire(16);
  EXPECT_OK(program.Write(slot, 3));
  EXPECT_OK(pool->Commit(slot, {1, 2, 3}));
  const SlotRow before = pool->Rows().at(0);
  EXPECT_OK(pool->Extend({slot}, {64}).status);
  EXPECT_OK(pool->Commit(slot, {4, 5}));
  EXPECT_OK(pool->Retract(slot, before.reserved, before.committed));
  const SlotRow after = pool->Rows().at(0);
  EXPECT_EQ(after.reserved, before.reserved);
  EXPECT_EQ(pool->Committed(slot), (std::vector<std::int32_t>{1, 2, 3}));
  std::int64_t freed = 0;
  EXPECT_OK(pool->Trim(&freed));  // frees the spare blocks
  EXPECT_EQ(pool->Rows().at(0).blocks, before.blocks);
  EXPECT_OK(pool->Retract(slot, 64, 64));  // never adds room or tokens
  EXPECT_EQ(pool->Rows().at(0).reserved, before.reserved);
  EXPECT_FALSE(pool->Retract(slot + 1, 0, 0).ok());
  EXPECT_OK(pool->Audit());
}

}  // namespace kvpage::testing
