// drop_before through the pool: blocks that are freed at the beginning of a slot, who may still read it, and what
// happens to shared, cached and parked blocks.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

struct Dropper {
  explicit Dropper(Layout layout, std::int32_t tokens = 70)
      : geometry(SmallGeometry(layout)), ranges(geometry.num_ranges()) {
    auto faulty = std::make_unique<FaultyVmm>(MakeVmm(geometry));
    vmm = faulty.get();
    pool = MakePool(geometry, 24 * ranges, {}, std::move(faulty));
    program = std::make_unique<Program>(pool.get());
    slot = program->Acquire(tokens);
    WriteStamped(pool.get(), program.get(), slot, tokens, 1);
  }
  // The host's part; returns the tokens that the program must drop.
  std::int64_t Start(std::int32_t which, std::int64_t tokens) {
    std::vector<std::int64_t> dropped;
    EXPECT_OK(pool->DropBefore({which}, {tokens}, &dropped));
    return dropped.empty() ? -1 : dropped[0];
  }
  void Drop(std::int32_t which, std::int64_t tokens) {
    const std::int64_t dropped = Start(which, tokens);
    if (dropped > 0) {
      EXPECT_OK(program->RunDrop(which, static_cast<std::int32_t>(dropped)));
    }
  }
  // Reads one token at the end through a window (0: no window).
  Status Read(std::int32_t which, std::int32_t window, PinnedSlots* pinned = nullptr) {
    PinnedSlots own;
    std::vector<std::int32_t> lengths(kSlots, -1);
    lengths[which] = program->length(which) - 1;
    CacheRef cache = program->cache();
    cache.lengths = lengths.data();
    const std::int32_t offsets[] = {0, 1};
    BatchRef batch = {&which, 1, offsets, 1};
    batch.attends = true;
    batch.window = window;
    return pool->Begin("paged_attention", cache, batch, 0, false, pinned != nullptr ? pinned : &own);
  }
  std::int64_t mapped() { return pool->Numbers().blocks_mapped / ranges; }

  const Geometry geometry;
  const std::int64_t ranges;
  FaultyVmm* vmm = nullptr;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Program> program;
  std::int32_t slot = -1;
};

class DroppingTest : public ::testing::TestWithParam<Layout> {};

TEST_P(DroppingTest, WholeBlocksComeBackWhenTheProgramHasRun) {
  Dropper d(GetParam());
  EXPECT_EQ(d.mapped(), 5);
  EXPECT_EQ(d.Start(d.slot, 51), 48);
  EXPECT_EQ(d.mapped(), 5) << "programs that are queued may still read them";
  EXPECT_OK(d.Read(d.slot, 0));
  EXPECT_OK(d.program->RunDrop(d.slot, 48));
  EXPECT_EQ(d.mapped(), 2);
  EXPECT_EQ(d.Start(d.slot, 63), 0) << "no other block";
  EXPECT_EQ(RowOf(d.pool.get(), d.slot).dropped, 48);
  EXPECT_EQ(RowOf(d.pool.get(), d.slot).blocks, 2 * d.ranges);
  BlockReferences map;
  EXPECT_OK(d.pool->BlockMap(d.slot, &map));
  for (const auto& range : map) {
    ASSERT_EQ(range.size(), std::size_t{5});
    for (int i = 0; i < 5; ++i) EXPECT_EQ(range[i].first < 0, i < 3);
  }
  EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 48, 70, 1), 22);
  WriteStamped(d.pool.get(), d.program.get(), d.slot, 30, 2);
  EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 70, 100, 2), 30);
  EXPECT_TRUE(AddsUp(d.pool.get()));
  d.program->Release(d.slot);
  const std::int32_t next = d.program->Acquire(100);
  EXPECT_EQ(d.mapped(), 7) << "a slot with a hole is not adopted";
  EXPECT_TRUE(AddsUp(d.pool.get()));
  EXPECT_EQ(RowOf(d.pool.get(), next).dropped, 0);
}

TEST_P(DroppingTest, BlocksWaitForReadersThatWereThereBefore) {
  Dropper d(GetParam());
  {
    PinnedSlots early;
    EXPECT_OK(d.Read(d.slot, 0, &early));
    d.Drop(d.slot, 51);
    EXPECT_EQ(d.mapped(), 5);
    EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 0, 70, 1), 70);
    EXPECT_TRUE(Mentions(d.Read(d.slot, 0), "below 48 were dropped")) << "no other reader comes";
    PinnedSlots late;
    EXPECT_OK(d.Read(d.slot, 22, &late));
    EXPECT_EQ(d.mapped(), 5);
  }
  EXPECT_EQ(d.mapped(), 2);
}

TEST_P(DroppingTest, ReadersNeedAWindowBehindTheHole) {
  Dropper d(GetParam());
  d.Drop(d.slot, 48);
  // The last token is at position 69.
  EXPECT_OK(d.Read(d.slot, 1));
  EXPECT_OK(d.Read(d.slot, 22));
  EXPECT_TRUE(Mentions(d.Read(d.slot, 23), "position 47 on are needed"));
  EXPECT_TRUE(Mentions(d.Read(d.slot, 70), "position 0 on are needed"));
  EXPECT_TRUE(Mentions(d.Read(d.slot, -1), "position 0 on are needed"));
  EXPECT_TRUE(Mentions(d.program->SetLength(d.slot, 47), "below 48 were dropped"));
  EXPECT_OK(d.program->SetLength(d.slot, 60));
  EXPECT_TRUE(Mentions(d.pool->Truncate({d.slot}, {47}).status, "below 48 were dropped"));
  EXPECT_TRUE(Mentions(d.program->RunTruncate(d.slot, 47), "below 48 were dropped"));
  EXPECT_TRUE(Mentions(d.pool->Fork("fork", {{d.slot, -1}}, {}).status, "has dropped its tokens below 48"));
  // Copies that a program makes up.
  const std::int32_t other = d.program->Acquire(70);
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths(kSlots);
  for (const TokenCopy& copy : {TokenCopy{d.slot, other, 0, 10}, TokenCopy{other, d.slot, 0, 0}}) {
    PinnedSlots pinned;
    const Status status =
        d.pool->EditSlots("fork", d.program->cache(), {nullptr, 0, &copy, 1}, &pinned, &epoch, lengths.data());
    if (copy.count > 0) {
      EXPECT_TRUE(Mentions(status, "below 48 were dropped")) << status.message();
    } else {
      EXPECT_OK(status);
      d.program->SetEpoch(epoch);
    }
  }
}

TEST_P(DroppingTest, WhatOthersShareStaysWithThem) {
  Dropper d(GetParam());
  const std::int32_t fork = d.program->Fork(d.slot);
  EXPECT_EQ(d.mapped(), 6);
  d.Drop(fork, 48);
  EXPECT_EQ(d.mapped(), 6);
  EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 0, 70, 1), 70);
  d.Drop(d.slot, 32);
  EXPECT_EQ(d.mapped(), 4);
  // The donor still has a private block where the fork has its hole.
  EXPECT_EQ(RowOf(d.pool.get(), d.slot).shared, d.ranges);
  d.program->Truncate(d.slot, 50);
  WriteStamped(d.pool.get(), d.program.get(), d.slot, 10, 2);
  EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 32, 50, 1), 18);
  EXPECT_EQ(CountStamped(d.pool.get(), fork, 48, 70, 1), 22);
  d.Drop(d.slot, 60);
  d.program->Release(fork);
  d.program->Release(d.slot);
  std::int64_t freed = 0;
  EXPECT_OK(d.pool->Trim(&freed));
  EXPECT_EQ(d.pool->Numbers().blocks_free, d.pool->Numbers().blocks_total);
}

TEST_P(DroppingTest, FailedUnmappingIsTriedAgain) {
  for (int at = 0; at < static_cast<int>(SmallGeometry(GetParam()).num_ranges()); ++at) {
    Dropper d(GetParam());
    const std::int32_t fork = d.program->Fork(d.slot, 40);
    WriteStamped(d.pool.get(), d.program.get(), fork, 30, 2);
    const std::int64_t before = d.mapped();
    d.vmm->FailAt(Verb::kUnmap, at);
    EXPECT_EQ(d.Start(fork, 60), 48);
    EXPECT_OK(d.program->RunDrop(fork, 48));
    EXPECT_TRUE(d.vmm->failed());
    EXPECT_EQ(CountStamped(d.pool.get(), fork, 0, 40, 1), 40) << "mapped again";
    EXPECT_EQ(d.mapped(), before - 1) << "two blocks are the donor's";
    EXPECT_EQ(CountStamped(d.pool.get(), fork, 48, 70, 2), 22);
    EXPECT_TRUE(AddsUp(d.pool.get()));
  }
}

TEST_P(DroppingTest, UndoneAndNeverRunDropsLeaveTheSequenceWhole) {
  Dropper d(GetParam());
  d.Drop(d.slot, 20);
  EXPECT_EQ(d.Start(d.slot, 51), 48);
  d.pool->UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kDrop), d.slot, 48}});
  EXPECT_EQ(RowOf(d.pool.get(), d.slot).dropped, 16);
  EXPECT_OK(d.Read(d.slot, 54));
  EXPECT_EQ(d.Start(d.slot, 51), 48);
  d.program->Restart();
  EXPECT_EQ(RowOf(d.pool.get(), d.slot).dropped, 16);
  EXPECT_OK(d.Read(d.slot, 54));
  EXPECT_TRUE(Mentions(d.program->RunDrop(d.slot, 80), "cannot drop its tokens below 80, it has 70"));
  EXPECT_EQ(d.mapped(), 4);
  EXPECT_EQ(CountStamped(d.pool.get(), d.slot, 16, 70, 1), 54);
}

TEST_P(DroppingTest, AllOrNothing) {
  Dropper d(GetParam());
  const std::int32_t other = d.program->Acquire(20);
  std::vector<std::int64_t> dropped;
  const auto refused = [&](const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
    const Status status = d.pool->DropBefore(slots, tokens, &dropped);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(RowOf(d.pool.get(), d.slot).dropped, 0);
    return status;
  };
  EXPECT_TRUE(Mentions(refused({d.slot, other}, {40, 33}), "it has 32"));
  EXPECT_TRUE(Mentions(refused({d.slot, d.slot}, {40, 40}), "named twice"));
  EXPECT_TRUE(Mentions(refused({d.slot, kSlots}, {40, 0}), "does not exist"));
  EXPECT_TRUE(Mentions(refused({d.slot, 3}, {40, 0}), "free: acquire it first"));
}

TEST_P(DroppingTest, TheIndexForgetsIt) {
  const Geometry geometry = SmallGeometry(GetParam());
  const std::shared_ptr<Pool> pool = MakePool(geometry, 24 * geometry.num_ranges());
  Program program(pool.get());
  const std::vector<std::int32_t> ids(70, 5);
  const std::int32_t slot = program.AcquirePrefix(ids).slots[0];
  EXPECT_OK(program.Write(slot, 70));
  EXPECT_OK(pool->Commit(slot, ids));
  const Claim shorter = program.AcquirePrefix(std::vector<std::int32_t>(40, 5));
  EXPECT_EQ(shorter.tokens[0], 39);
  std::vector<std::int64_t> dropped;
  EXPECT_OK(pool->DropBefore({slot}, {51}, &dropped));
  std::int64_t found = 0;
  EXPECT_OK(pool->FindPrefix("", ids, true, &found));
  EXPECT_EQ(found, 32) << "the whole blocks that the other one shares";
  EXPECT_OK(program.RunDrop(slot, 48));
  EXPECT_OK(pool->Commit(slot, {1}));
  program.Release(slot);
  EXPECT_OK(pool->FindPrefix("", ids, true, &found));
  EXPECT_EQ(found, 32);
  const Claim again = program.AcquirePrefix(ids);
  EXPECT_OK(again.status);
  EXPECT_TRUE(AddsUp(pool.get()));
  BlockReferences map;
  EXPECT_OK(pool->BlockMap(again.slots[0], &map));
  for (const auto& range : map) {
    for (const auto& block : range) EXPECT_GE(block.first, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, DroppingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
