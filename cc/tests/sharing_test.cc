// Forks and truncations through the pool: contents, accounts, and the order of host calls and their programs.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"
#include "vmm/mappings.h"

namespace kvpage::testing {
namespace {

// A donor with committed tokens.
struct Family {
  explicit Family(Layout layout, std::int32_t tokens, std::int64_t logical_blocks = 24, MapAccount* account = nullptr)
      : geometry(SmallGeometry(layout)), ranges(geometry.num_ranges()) {
    const Status status =
        Pool::Make(geometry, logical_blocks * ranges * geometry.block_bytes, {}, MakeVmm(geometry), account, &pool);
    EXPECT_OK(status);
    program = std::make_unique<Program>(pool.get());
    donor = program->Acquire(tokens);
    WriteStamped(pool.get(), program.get(), donor, tokens, 1);
  }
  // The number of mapped logical blocks, each counted once.
  std::int64_t mapped() { return pool->Numbers().blocks_mapped / ranges; }
  std::int64_t Has(std::int32_t slot, std::int64_t begin, std::int64_t end, float stamp) {
    return CountStamped(pool.get(), slot, begin, end, stamp);
  }

  const Geometry geometry;
  const std::int64_t ranges;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<Program> program;
  std::int32_t donor = -1;
};

class SharingTest : public ::testing::TestWithParam<Layout> {};

TEST_P(SharingTest, AForkSharesWholeBlocksAndCopiesTheRest) {
  Family f(GetParam(), 40);
  const std::int32_t fork = f.program->Fork(f.donor);
  EXPECT_EQ(f.program->length(fork), 40);
  EXPECT_EQ(f.mapped(), 4) << "two shared ones, and a third of each";
  EXPECT_EQ(f.pool->Numbers().blocks_shared, 2 * f.ranges);
  EXPECT_EQ(RowOf(f.pool.get(), fork).shared, 2 * f.ranges);
  EXPECT_EQ(RowOf(f.pool.get(), f.donor).shared, 2 * f.ranges);
  EXPECT_EQ(f.pool->Committed(fork).size(), std::size_t{40});
  WriteStamped(f.pool.get(), f.program.get(), fork, 20, 2);
  WriteStamped(f.pool.get(), f.program.get(), f.donor, 5, 3);
  EXPECT_EQ(f.Has(fork, 0, 40, 1), 40);
  EXPECT_EQ(f.Has(fork, 40, 60, 2), 20);
  EXPECT_EQ(f.Has(f.donor, 0, 40, 1), 40);
  EXPECT_EQ(f.Has(f.donor, 40, 45, 3), 5);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, ABlockHasOneWriter) {
  Family f(GetParam(), 40);
  const std::int32_t fork = f.program->Fork(f.donor);
  for (const std::int32_t slot : {fork, f.donor}) {
    EXPECT_TRUE(Mentions(f.program->SetLength(slot, 31), "tokens below 32 are shared"));
    std::vector<std::int32_t> lengths(kSlots, 40);
    lengths[slot] = 31;  // a program that changes the cache's lengths
    CacheRef cache = f.program->cache();
    cache.lengths = lengths.data();
    const std::int32_t offsets[] = {0, 1};
    PinnedSlots pinned;
    const Status status = f.pool->Begin("append_kv", cache, {&slot, 1, offsets, 1}, 0, true, &pinned);
    EXPECT_TRUE(Mentions(status, "tokens below 32 are shared")) << status.message();
  }
}

TEST_P(SharingTest, TheLastOwnerKeepsTheBlocks) {
  Family f(GetParam(), 48);
  const std::int32_t child = f.program->Fork(f.donor);
  const std::int32_t grandchild = f.program->Fork(child, 32);
  EXPECT_EQ(f.mapped(), 3);
  f.program->Release(f.donor);
  f.program->Release(child);
  EXPECT_EQ(f.Has(grandchild, 0, 32, 1), 32);
  std::int64_t freed = 0;
  EXPECT_OK(f.pool->Trim(&freed));
  EXPECT_EQ(f.mapped(), 2);
  EXPECT_EQ(f.pool->Numbers().blocks_parked, 0);
  // Nobody else has the blocks: they become the slot's own without a copy.
  f.program->Truncate(grandchild, 5);
  EXPECT_EQ(f.mapped(), 2);
  WriteStamped(f.pool.get(), f.program.get(), grandchild, 20, 2);
  EXPECT_EQ(f.Has(grandchild, 0, 5, 1), 5);
  EXPECT_EQ(f.Has(grandchild, 5, 25, 2), 20);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, ATruncationSetsBlocksAsideUntilItRuns) {
  for (const bool of_donor : {false, true}) {
    Family f(GetParam(), 48);
    const std::int32_t fork = f.program->Fork(f.donor);
    const std::int32_t cut = of_donor ? f.donor : fork, other = of_donor ? fork : f.donor;
    EXPECT_EQ(f.mapped(), 3);
    bool shares = false;
    EXPECT_OK(f.pool->SharesBehind(cut, 20, &shares));
    EXPECT_TRUE(shares);
    EXPECT_OK(f.pool->Truncate({cut}, {20}).status);
    EXPECT_EQ(f.mapped(), 5) << "two are set aside";
    EXPECT_EQ(f.pool->Committed(cut).size(), std::size_t{20});
    EXPECT_TRUE(AddsUp(f.pool.get()));
    EXPECT_OK(f.program->RunTruncate(cut, 20));
    EXPECT_EQ(f.mapped(), 5);
    EXPECT_EQ(f.pool->Numbers().blocks_shared, f.ranges);
    WriteStamped(f.pool.get(), f.program.get(), cut, 20, 2);
    EXPECT_EQ(f.Has(cut, 0, 20, 1), 20);
    EXPECT_EQ(f.Has(cut, 20, 40, 2), 20);
    EXPECT_EQ(f.Has(other, 0, 48, 1), 48);
  }
}

TEST_P(SharingTest, OfSharersTruncatedInOneCallTheLastKeepsTheBlocks) {
  for (const bool donor_last : {false, true}) {
    Family f(GetParam(), 48);
    const std::int32_t fork = f.program->Fork(f.donor);
    const std::int32_t first = donor_last ? fork : f.donor, last = donor_last ? f.donor : fork;
    EXPECT_OK(f.pool->Truncate({first, last}, {5, 20}).status);
    EXPECT_EQ(f.mapped(), 6) << "one copy of each";
    EXPECT_OK(f.program->RunTruncate(first, 5));
    EXPECT_OK(f.program->RunTruncate(last, 20));
    EXPECT_EQ(f.mapped(), 6);
    EXPECT_EQ(f.pool->Numbers().blocks_shared, 0);
    WriteStamped(f.pool.get(), f.program.get(), first, 40, 2);
    WriteStamped(f.pool.get(), f.program.get(), last, 20, 3);
    EXPECT_EQ(f.Has(first, 0, 5, 1) + f.Has(last, 0, 20, 1), 25);
    EXPECT_EQ(f.Has(first, 5, 45, 2) + f.Has(last, 20, 40, 3), 60);
    EXPECT_TRUE(AddsUp(f.pool.get()));
  }
}

TEST_P(SharingTest, WhatIsSetAsideGoesWithTheSlot) {
  Family f(GetParam(), 48);
  const std::int32_t fork = f.program->Fork(f.donor);
  EXPECT_OK(f.pool->Truncate({f.donor}, {0}).status);
  EXPECT_EQ(f.mapped(), 6);
  f.program->Release(f.donor);
  std::int64_t freed = 0;
  EXPECT_OK(f.pool->Trim(&freed));
  EXPECT_EQ(f.mapped(), 3);
  EXPECT_EQ(f.Has(fork, 0, 48, 1), 48);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, TwoTruncationsQueuedBeforeTheFirstRuns) {
  Family f(GetParam(), 48);
  const std::int32_t fork = f.program->Fork(f.donor);
  EXPECT_OK(f.pool->Truncate({f.donor}, {40}).status);
  EXPECT_OK(f.pool->Truncate({f.donor}, {20}).status);
  EXPECT_OK(f.program->RunTruncate(f.donor, 40));
  EXPECT_EQ(f.Has(f.donor, 0, 40, 1), 40);
  EXPECT_OK(f.program->RunTruncate(f.donor, 20));
  EXPECT_EQ(f.mapped(), 5);
  WriteStamped(f.pool.get(), f.program.get(), f.donor, 28, 2);
  EXPECT_EQ(f.Has(f.donor, 0, 20, 1), 20);
  EXPECT_EQ(f.Has(fork, 0, 48, 1), 48);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, AForkAfterAQueuedTruncation) {
  Family f(GetParam(), 48);
  const std::int32_t first = f.program->Fork(f.donor);
  EXPECT_OK(f.pool->Truncate({f.donor}, {20}).status);
  const Claim claim = f.pool->Fork("fork", {{f.donor, -1}}, {});
  EXPECT_OK(claim.status);
  EXPECT_EQ(claim.tokens[0], 20) << "what is cut away is not committed any more";
  EXPECT_OK(f.program->RunTruncate(f.donor, 20));
  EXPECT_OK(f.program->RunFork(claim.slots[0], f.donor, 20));
  WriteStamped(f.pool.get(), f.program.get(), f.donor, 20, 2);
  WriteStamped(f.pool.get(), f.program.get(), claim.slots[0], 20, 3);
  EXPECT_EQ(f.Has(f.donor, 0, 20, 1) + f.Has(claim.slots[0], 0, 20, 1) + f.Has(first, 0, 48, 1), 88);
  EXPECT_EQ(f.Has(f.donor, 20, 40, 2) + f.Has(claim.slots[0], 20, 40, 3), 40);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, AForkWhoseProgramNeverRanIsFreeInTheNextGeneration) {
  Family f(GetParam(), 40);
  const Claim claim = f.pool->Fork("fork", {{f.donor, -1}}, {});
  EXPECT_OK(claim.status);
  const std::int32_t fork = claim.slots[0];
  Program old = *f.program;
  f.program->Restart();
  EXPECT_TRUE(Mentions(old.RunFork(fork, f.donor, 40), "generation"));
  EXPECT_EQ(f.program->length(fork), -1);
  EXPECT_EQ(f.pool->Numbers().slots_occupied, 1);
  WriteStamped(f.pool.get(), f.program.get(), f.donor, 8, 2);
  EXPECT_EQ(f.Has(f.donor, 0, 40, 1), 40);
  const std::int32_t next = f.program->Acquire(48);
  WriteStamped(f.pool.get(), f.program.get(), next, 48, 3);
  EXPECT_EQ(f.Has(f.donor, 0, 40, 1), 40);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, ATruncationWhoseProgramNeverRanGivesItsBlocksBack) {
  Family f(GetParam(), 48);
  const std::int32_t fork = f.program->Fork(f.donor);
  EXPECT_OK(f.pool->Truncate({f.donor}, {20}).status);
  EXPECT_EQ(f.mapped(), 5);
  Program old = *f.program;
  f.program->Restart();
  EXPECT_EQ(f.mapped(), 3);
  EXPECT_TRUE(Mentions(old.RunTruncate(f.donor, 20), "generation"));
  EXPECT_EQ(f.program->length(f.donor), 48) << "it has its tokens still";
  EXPECT_EQ(f.Has(f.donor, 0, 48, 1) + f.Has(fork, 0, 48, 1), 96);
  EXPECT_OK(f.pool->Truncate({fork}, {20}).status);
  EXPECT_EQ(f.mapped(), 5);
  EXPECT_OK(f.program->RunTruncate(fork, 20));
  WriteStamped(f.pool.get(), f.program.get(), fork, 28, 2);
  EXPECT_EQ(f.Has(fork, 0, 20, 1) + f.Has(fork, 20, 48, 2) + f.Has(f.donor, 0, 48, 1), 96);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, UndoneForksAndTruncations) {
  Family f(GetParam(), 40);
  const std::int64_t free = f.pool->Numbers().blocks_free;
  const Claim claim = f.pool->Fork("fork", {{f.donor, -1}}, {});
  EXPECT_OK(claim.status);
  f.pool->UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kFork), claim.slots[0], 40, f.donor}});
  EXPECT_EQ(f.pool->Numbers().slots_occupied, 1);
  std::int64_t freed = 0;
  EXPECT_OK(f.pool->Trim(&freed));
  EXPECT_EQ(f.pool->Numbers().blocks_free, free);
  EXPECT_EQ(f.pool->Numbers().blocks_shared, 0);
  const std::int32_t fork = f.program->Fork(f.donor);
  const std::int64_t mapped = f.mapped();
  EXPECT_OK(f.pool->Truncate({f.donor}, {3}).status);
  EXPECT_EQ(f.mapped(), mapped + 2);
  f.pool->UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kTruncate), f.donor, 3}});
  EXPECT_EQ(f.mapped(), mapped);
  EXPECT_EQ(f.pool->Committed(f.donor).size(), std::size_t{40});
  EXPECT_EQ(f.Has(fork, 0, 40, 1) + f.Has(f.donor, 0, 40, 1), 80);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, ParkedBorrowersAreEmptiedAtTheNextClaim) {
  Family f(GetParam(), 40);
  const std::int32_t fork = f.program->Fork(f.donor);
  f.program->Release(fork);
  EXPECT_EQ(f.pool->Numbers().blocks_shared, 2 * f.ranges);
  const std::int32_t next = f.program->Acquire(16);
  EXPECT_EQ(f.pool->Numbers().blocks_shared, 0);
  WriteStamped(f.pool.get(), f.program.get(), next, 16, 2);
  EXPECT_EQ(f.Has(f.donor, 0, 40, 1), 40);
  EXPECT_EQ(f.mapped(), 4);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, ReleasedByTheSameCall) {
  Family f(GetParam(), 40);
  const std::int32_t old = f.program->Fork(f.donor);
  const Claim claim = f.pool->Fork("reorder", {{f.donor, -1}}, {old});
  EXPECT_OK(claim.status);
  EXPECT_EQ(f.pool->Numbers().slots_draining, 1);
  EXPECT_TRUE(Mentions(f.pool->Fork("reorder", {{f.donor, -1}}, {old}).status, "draining"));
  EXPECT_TRUE(Mentions(f.pool->Fork("reorder", {{f.donor, -1}}, {f.donor}).status, "released by the same call"));
  EXPECT_TRUE(Mentions(f.pool->Fork("fork", {{f.donor, 41}}, {}).status, "40 committed"));
  EXPECT_EQ(f.pool->Numbers().slots_occupied, 2);
}

TEST_P(SharingTest, TooFewBlocksChangeNothing) {
  Family f(GetParam(), 48, 4);
  const std::int32_t fork = f.program->Fork(f.donor);
  EXPECT_EQ(f.mapped(), 3);
  const Claim truncation = f.pool->Truncate({f.donor, fork}, {20, 0});
  EXPECT_EQ(truncation.status.code(), Code::kResourceExhausted);
  EXPECT_EQ(truncation.wanted, 3 * f.ranges) << "of both slots; what both give up the last one keeps";
  EXPECT_EQ(f.mapped(), 3);
  EXPECT_EQ(f.pool->Committed(f.donor).size(), std::size_t{48});
  WriteStamped(f.pool.get(), f.program.get(), f.donor, 16, 2);
  const Claim claim = f.pool->Fork("fork", {{f.donor, 40}}, {});
  EXPECT_EQ(claim.status.code(), Code::kResourceExhausted);
  EXPECT_EQ(f.pool->Numbers().slots_occupied, 2);
  EXPECT_EQ(f.mapped(), 4);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(SharingTest, MappingsArePromisedAndGivenBack) {
  static std::int64_t limit = 0;
  MapAccount account([] { return MapAccount::Limits{limit, 0}; });
  limit = 100000;
  const std::int64_t before = [&] {
    const Family f(GetParam(), 48, 24, &account);
    return account.promised();
  }();
  for (const std::int64_t more : {0, 1000}) {
    limit = (before + more) * 8 / 7 + 1;
    Family f(GetParam(), 48, 24, &account);
    const PoolNumbers numbers = f.pool->Numbers();
    const Claim claim = f.pool->Fork("fork", {{f.donor, -1}}, {});
    if (more == 0) {
      EXPECT_EQ(claim.status.code(), Code::kFailedPrecondition);
      EXPECT_TRUE(Mentions(claim.status, "more memory mappings")) << claim.status.message();
      EXPECT_EQ(account.promised(), before);
      EXPECT_EQ(f.pool->Numbers().slots_occupied, 1);
      EXPECT_EQ(f.pool->Numbers().blocks_free, numbers.blocks_free);
      limit = 100000;
      EXPECT_EQ(f.Has(f.program->Fork(f.donor), 0, 48, 1), 48);
      continue;
    }
    EXPECT_OK(claim.status);
    EXPECT_OK(f.program->RunFork(claim.slots[0], f.donor, 48));
    EXPECT_GT(account.promised(), before);
    f.program->Truncate(f.donor, 20);
    f.program->Truncate(claim.slots[0], 3);
    f.program->Release(claim.slots[0]);
    f.program->Release(f.donor);
    EXPECT_OK(f.pool->Acquire({16}).status);
    EXPECT_EQ(account.promised(), before);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, SharingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
