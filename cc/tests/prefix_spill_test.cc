// Blocks that are written before they are evicted: in which order, down to which share, and the effect of a slow or
// full disk.
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <utility>

#include "tests/expect_ok.h"
#include "tests/prefix_threads.h"
#include "tests/store_rig.h"
#include "tests/text.h"

namespace kvpage::testing {
namespace {

using store::testing::Soon;
using store::testing::TemporaryFolder;
using Ids = std::vector<std::int32_t>;

class PrefixSpillTest : public ::testing::TestWithParam<Layout> {
 protected:
  std::unique_ptr<PrefixRig> Open(std::int64_t blocks, double write_ahead, store::StoreOptions options = {}) {
    options.io = io_;
    store_ = OpenShared(folder_, options);
    auto rig = std::make_unique<PrefixRig>(GetParam(), blocks);
    EXPECT_OK(rig->pool->AttachStore(store_, write_ahead));
    return rig;
  }
  // Runs and releases a sequence; returns the number of its tokens that were found.
  static std::int64_t Run(PrefixRig* rig, const Ids& ids) {
    const Claim claim = rig->program->AcquirePrefix(ids);
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    const std::int32_t slot = claim.slots[0];
    const std::int64_t found = claim.tokens[0];
    EXPECT_EQ(CountStamped(rig->pool.get(), slot, 0, found, static_cast<float>(ids[0])), found);
    const auto missing = static_cast<std::int32_t>(ids.size()) - static_cast<std::int32_t>(found);
    EXPECT_OK(rig->pool->Extend({slot}, {static_cast<std::int64_t>(ids.size())}).status);
    EXPECT_OK(rig->program->Write(slot, missing));
    ForTokens(rig->pool.get(), slot, found, static_cast<std::int64_t>(ids.size()),
              [&](float& at, float token) { at = 1000 * static_cast<float>(ids[0]) + token; });
    EXPECT_OK(rig->pool->Commit(slot, Ids(ids.begin() + found, ids.end())));
    rig->program->Release(slot);
    return found;
  }
  std::int64_t Stored(PrefixRig* rig, const Ids& ids) const {
    std::int64_t stored = -1;
    EXPECT_OK(rig->pool->StoredPrefix("", ids, &stored));
    return stored / 16;
  }
  prefix::SpillNumbers Spills(PrefixRig* rig) const { return rig->pool->StoreNumbers().spills; }

  const TemporaryFolder folder_;
  const std::shared_ptr<HeldIo> io_ = std::make_shared<HeldIo>();
  std::shared_ptr<store::BlockStore> store_;
};

TEST_P(PrefixSpillTest, WhatIsEvictedNextIsWrittenDownToTheShare) {
  const auto rig = Open(20, 0.5);
  Run(rig.get(), Text(1, 3));
  Run(rig.get(), Text(2, 3));
  usleep(20000);
  EXPECT_EQ(Spills(rig.get()).tokens, 0);  // 12 of 20 blocks are free
  Run(rig.get(), Text(3, 3));              // 8 are free
  ASSERT_TRUE(Soon([&] { return Spills(rig.get()).tokens == 3 * 16; }));
  std::vector<std::int32_t> kept;
  for (std::int32_t i = 1; i <= 3; ++i) {
    if (Stored(rig.get(), Text(i, 3)) == 0) kept.push_back(i);
  }
  ASSERT_EQ(kept.size(), 2u);
  // The written blocks are evicted first, even if they are worth more, and those next in line are written.
  const std::int32_t written = 6 - kept[0] - kept[1];
  ASSERT_OK(rig->pool->Hint("", Text(written, 3), PrefixHint::kRetain));
  std::int64_t freed = 0;
  const std::int64_t ranges = rig->geometry.num_ranges();
  ASSERT_OK(rig->pool->Evict(4 * ranges, &freed));
  EXPECT_EQ(freed, 4 * ranges);
  for (const std::int32_t i : kept) EXPECT_EQ(Run(rig.get(), Text(i, 3)), 48);
  EXPECT_EQ(rig->pool->StoreNumbers().unwritten_evictions, 0);
  EXPECT_TRUE(AddsUp(rig->pool.get()));
}

TEST_P(PrefixSpillTest, EverythingComesBackFromTheStore) {
  auto rig = Open(30, 1);
  for (std::int32_t i = 1; i <= 3; ++i) Run(rig.get(), Text(i, 4));
  Ids longer = Text(1, 6);
  Run(rig.get(), longer);  // continues a sequence that is already stored
  ASSERT_TRUE(Soon([&] { return Spills(rig.get()).tokens == 14 * 16; }));
  EXPECT_EQ(Spills(rig.get()).bytes, 14 * rig->geometry.num_ranges() * rig->geometry.block_bytes);
  std::int64_t freed = 0;
  ASSERT_OK(rig->pool->Evict(1000, &freed));
  EXPECT_EQ(rig->pool->Numbers().blocks_cached, 0);
  EXPECT_EQ(rig->pool->StoreNumbers().unwritten_evictions, 0);
  for (const Ids& ids : {longer, Text(2, 4), Text(3, 4)}) {
    std::shared_ptr<prefix::FetchTicket> ticket;
    ASSERT_OK(rig->pool->Prefetch({"", ids, 0}, &ticket));
    ASSERT_TRUE(ticket->Wait(60));
    EXPECT_EQ(Run(rig.get(), ids), static_cast<std::int64_t>(ids.size()) - 1);
  }
  // Blocks that were read are not written again.
  usleep(20000);
  EXPECT_EQ(Spills(rig.get()).tokens, 14 * 16);
  EXPECT_EQ(rig->pool->StoreNumbers().store_hits, 14 * 16);
}

TEST_P(PrefixSpillTest, ASlowDiskMakesNobodyWait) {
  const auto rig = Open(16, 1);
  io_->hold = true;
  for (std::int32_t i = 1; i <= 12; ++i) {
    EXPECT_EQ(Run(rig.get(), Text(i, 5)), 0);
    EXPECT_TRUE(AddsUp(rig->pool.get()));
  }
  // A program maps under the same pressure.
  const std::int32_t slot = rig->program->Acquire(1);
  for (std::int32_t tokens = 16; tokens <= 128; tokens += 16) {
    bool ok = false;
    ASSERT_OK(rig->program->Map(slot, tokens, &ok));
    EXPECT_TRUE(ok);
  }
  EXPECT_EQ(Spills(rig.get()).tokens, 0);
  EXPECT_GT(rig->pool->StoreNumbers().unwritten_evictions, 30);
  io_->hold = false;
  EXPECT_TRUE(Soon([&] { return Spills(rig.get()).tokens > 0; }));
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixSpillTest, AFullDiskMakesNobodyFail) {
  const auto rig = Open(16, 1);
  io_->error = ENOSPC;
  for (std::int32_t i = 1; i <= 12; ++i) EXPECT_EQ(Run(rig.get(), Text(i, 5)), 0);
  EXPECT_TRUE(Soon([&] { return Spills(rig.get()).failed > 0; }));
  // A program maps while nothing can be written.
  const std::int32_t slot = rig->program->Acquire(1);
  for (std::int32_t tokens = 16; tokens <= 128; tokens += 16) {
    bool ok = false;
    ASSERT_OK(rig->program->Map(slot, tokens, &ok));
    EXPECT_TRUE(ok);
  }
  rig->program->Release(slot);
  EXPECT_EQ(Spills(rig.get()).tokens, 0);
  EXPECT_TRUE(folder_.files().empty());
  io_->error = 0;
  // It is retried after a while.
  EXPECT_TRUE(Soon([&] {
    Run(rig.get(), Text(99, 5));
    return Spills(rig.get()).tokens > 0;
  }));
  EXPECT_TRUE(AddsUp(rig->pool.get()));
  EXPECT_OK(rig->pool->Audit());
}

TEST_P(PrefixSpillTest, WhatCouldNotBeWrittenIsNotTakenForWritten) {
  const auto rig = Open(16, 1);
  io_->error = ENOSPC;
  Run(rig.get(), Text(1, 5));
  ASSERT_TRUE(Soon([&] { return Spills(rig.get()).failed > 0; }));
  std::int64_t freed = 0;
  ASSERT_OK(rig->pool->Evict(1000, &freed));
  EXPECT_EQ(rig->pool->StoreNumbers().unwritten_evictions, 5);
}

TEST_P(PrefixSpillTest, AFullDiskIsNotTriedOverAndOver) {
  const auto rig = Open(16, 1);
  io_->error = ENOSPC;
  const auto begun = std::chrono::steady_clock::now();
  for (std::int32_t i = 1; i <= 40; ++i) {
    Run(rig.get(), Text(i, 5));
    usleep(1000);
  }
  EXPECT_TRUE(Soon([&] { return Spills(rig.get()).failed > 0; }));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
  EXPECT_LE(Spills(rig.get()).failed, 2 * (1 + seconds.count())) << "two writes at a time, and a pause of a second";
}

TEST_P(PrefixSpillTest, AStoreThatIsTooSmallKeepsWhatFits) {
  store::StoreOptions options;
  options.limit_bytes = 16 * 4096 * SmallGeometry(GetParam()).num_ranges();
  const auto rig = Open(64, 1, options);
  for (std::int32_t i = 1; i <= 6; ++i) Run(rig.get(), Text(i, 5));
  EXPECT_TRUE(Soon([&] { return Spills(rig.get()).tokens >= 4 * 5 * 16; }));
  usleep(50000);
  EXPECT_LE(Spills(rig.get()).tokens, 6 * 5 * 16);  // not over and over again
  EXPECT_TRUE(Soon([&] { return store_->Numbers().bytes <= options.limit_bytes; }));
}

TEST_P(PrefixSpillTest, WhatTheStoreLosesIsNotTakenForWritten) {
  const auto rig = Open(40, 1);
  for (std::int32_t i = 1; i <= 3; ++i) {
    Run(rig.get(), Text(i, 4));
    ASSERT_TRUE(Soon([&] { return Spills(rig.get()).tokens == 64 * i; }));
  }
  const auto lose = [&](std::int32_t i) {
    for (const store::StoredRun& run : store_->Runs(prefix::StoredShape(rig->geometry))) {
      if (run.tokens[0] == i) std::filesystem::remove(folder_.path() + "/" + run.file);
    }
    ASSERT_OK(store_->Refresh());
    EXPECT_EQ(Stored(rig.get(), Text(i, 4)), 0);
  };
  lose(1);
  lose(2);
  Run(rig.get(), Text(4, 1));
  ASSERT_TRUE(Soon([&] { return Spills(rig.get()).tokens == 13 * 16; }));
  usleep(50000);
  EXPECT_EQ(Stored(rig.get(), Text(1, 4)), 0) << "nobody has asked for it";
  // A request asks for one of them.
  EXPECT_EQ(Run(rig.get(), Text(1, 4)), 64);
  ASSERT_TRUE(Soon([&] { return Stored(rig.get(), Text(1, 4)) == 4; }));
  usleep(20000);  // the index learns of it
  std::int64_t freed = 0;
  ASSERT_OK(rig->pool->Evict(1000, &freed));
  EXPECT_EQ(rig->pool->StoreNumbers().unwritten_evictions, 4) << "the other one";
}

TEST_P(PrefixSpillTest, LiveAndDroppedSequencesAreNotWritten) {
  const auto rig = Open(16, 0.5);
  Run(rig.get(), Text(1, 2));
  ASSERT_OK(rig->pool->Hint("", Text(1, 2), PrefixHint::kDrop));
  const Claim live = rig->program->AcquirePrefix(Text(5, 3));
  WriteStamped(rig->pool.get(), rig->program.get(), live.slots[0], 40, 5);
  Run(rig.get(), Text(2, 2));
  ASSERT_TRUE(Soon([&] { return Spills(rig.get()).tokens == 2 * 16; }));
  usleep(10000);
  EXPECT_EQ(Spills(rig.get()).tokens, 2 * 16);
  EXPECT_EQ(Stored(rig.get(), Text(2, 2)), 2);
  EXPECT_EQ(store_->Numbers().files, 1);
}

TEST_P(PrefixSpillTest, PoolsAndStoresMayEndAtAnyTime) {
  for (int round = 0; round < 6; ++round) {
    auto rig = Open(16, 1);
    io_->hold = true;
    for (std::int32_t i = 1; i <= 4; ++i) Run(rig.get(), Text(10 * round + i, 5));
    if (round % 2 == 0) usleep(2000);
    if (round % 3 == 0) rig->pool->Close();
    if (round % 3 == 1) rig.reset();
    io_->hold = false;
    if (round % 3 == 2) store_->Close();
    if (rig != nullptr && round % 3 == 2) {
      Run(rig.get(), Text(9, 5));
    }
  }
}

TEST_P(PrefixSpillTest, ThreadsMeet) {
  const auto rig = Open(24, 1);
  Pool* const pool = rig->pool.get();
  RunBesideThreads(pool, [&](const auto& text) {
    Run(rig.get(), text);
    EXPECT_TRUE(AddsUp(pool));
    EXPECT_OK(pool->Audit());
  });
  EXPECT_TRUE(Soon([&] { return Spills(rig.get()).tokens > 0; }));
}

INSTANTIATE_TEST_SUITE_P(Layouts, PrefixSpillTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
