// Requests that find their first tokens in memory: contents and accounts, also with a page table that fails at every
// call in turn.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/faulty_vmm.h"
#include "tests/host_verbs.h"
#include "tests/pool_util.h"
#include "tests/prefix_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

// A released sequence of 40 tokens, in blocks of 16.
struct Fixture : PrefixRig {
  explicit Fixture(Layout layout, std::int64_t blocks = 24) : PrefixRig(layout, blocks) {
    const Claim claim = program->AcquirePrefix(Sevens(40));
    EXPECT_EQ(claim.tokens[0], 0);
    parked = claim.slots[0];
    WriteStamped(pool.get(), program.get(), parked, 40, 1);
    program->Release(parked);
  }
  bool Finds(const Claim& claim, std::int64_t tokens) {
    return claim.status.ok() && claim.tokens[0] == tokens &&
           CountStamped(pool.get(), claim.slots[0], 0, tokens, 1) == tokens;
  }

  std::int32_t parked = -1;
};

class PrefixTest : public ::testing::TestWithParam<Layout> {};

TEST_P(PrefixTest, AParkedSlotIsAdoptedWhereItsSequenceGoesOn) {
  Fixture f(GetParam());
  const std::int64_t calls = f.pool->Numbers().system_calls;
  std::vector<std::int32_t> ids = Sevens(45);
  ids[40] = 8;  // 40 of the tokens are known
  const Claim claim = f.program->AcquirePrefix(ids);
  EXPECT_EQ(claim.slots[0], f.parked);
  EXPECT_TRUE(f.Finds(claim, 40));
  EXPECT_EQ(f.pool->Numbers().system_calls, calls);
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(PrefixTest, OtherwiseBlocksAreMappedAndTheLastOneIsCopied) {
  Fixture f(GetParam());
  const Claim claim = f.program->AcquirePrefix(Sevens(30, 8));
  EXPECT_NE(claim.slots[0], f.parked);
  EXPECT_TRUE(f.Finds(claim, 29));
  EXPECT_EQ(f.pool->Numbers().blocks_shared, f.geometry.num_ranges());
  WriteStamped(f.pool.get(), f.program.get(), claim.slots[0], 20, 3);
  EXPECT_EQ(CountStamped(f.pool.get(), f.parked, 0, 40, 1), 40) << "nothing was written into the parked sequence";
  EXPECT_TRUE(AddsUp(f.pool.get()));
}

TEST_P(PrefixTest, WhatIsFoundMayNotBeWritten) {
  Fixture f(GetParam());
  std::vector<std::int32_t> ids = Sevens(45);
  ids[40] = 8;
  const std::int32_t slot = f.program->AcquirePrefix(ids).slots[0];
  EXPECT_TRUE(Mentions(f.program->SetLength(slot, 39), "set_lengths"));
  f.program->Truncate(slot, 20);  // removes it from what can be found
  std::int64_t found = 0;
  EXPECT_OK(f.pool->FindPrefix("", Sevens(41), false, &found));
  EXPECT_EQ(found, 20);
  WriteStamped(f.pool.get(), f.program.get(), slot, 5, 2);
  EXPECT_EQ(CountStamped(f.pool.get(), slot, 20, 25, 2), 5);
}

TEST_P(PrefixTest, EvictionMakesRoomAndSparesWhatIsMapped) {
  Fixture f(GetParam(), 6);
  const Claim live = f.program->AcquirePrefix(Sevens(18, 8));
  EXPECT_TRUE(f.Finds(live, 17));
  const Claim more = f.pool->Acquire({64});  // 6 blocks: one is shared, one is a copy
  EXPECT_OK(more.status);
  EXPECT_OK(f.program->Occupy(more.slots[0]));
  EXPECT_TRUE(AddsUp(f.pool.get()));
  EXPECT_EQ(CountStamped(f.pool.get(), live.slots[0], 0, 17, 1), 17);
  std::int64_t found = 0;
  EXPECT_OK(f.pool->FindPrefix("", Sevens(41), false, &found));
  EXPECT_EQ(found, 16) << "the block that a live slot maps";
  EXPECT_EQ(f.pool->Acquire({1}).status.reason(), Reason::kOutOfBlocks);
}

TEST_P(PrefixTest, AFailureChangesNothing) {
  for (const Verb verb : {Verb::kMapReadOnly, Verb::kCreate, Verb::kMap, Verb::kUnmap, Verb::kCopy}) {
    int call = 0, failures = 0;
    for (bool failed = true; failed; ++call) {
      const std::string at = "verb " + std::to_string(static_cast<int>(verb)) + ", call " + std::to_string(call);
      ASSERT_LT(call, 64) << at;
      Fixture f(GetParam());
      // Every free slot has blocks, which an empty one must give up.
      std::vector<std::int32_t> slots;
      for (std::int64_t n = 1; n < f.geometry.max_slots; ++n) slots.push_back(f.program->Acquire(16));
      for (const std::int32_t slot : slots) f.program->Release(slot);
      std::int64_t freed = 0;
      if (verb == Verb::kCreate) {
        EXPECT_OK(f.pool->Trim(&freed));
      }
      f.vmm->FailAt(verb, call);
      const Claim claim = f.pool->AcquirePrefix({{Sevens(30, 8), 60}}, {});
      failed = f.vmm->failed();
      f.vmm->FailAt(Verb::kNone, 0);
      EXPECT_TRUE(AddsUp(f.pool.get())) << at;
      if (!claim.status.ok()) {
        EXPECT_EQ(f.pool->Numbers().slots_occupied, 0) << at;
        EXPECT_TRUE(f.Finds(f.program->AcquirePrefix(Sevens(30, 8), 60), 29)) << at;
      } else {
        EXPECT_OK(f.program->RunPrefix(claim));
        EXPECT_TRUE(f.Finds(claim, 29)) << at;
      }
      failures += failed;
      // If the system has no memory to map, parked blocks are moved instead.
      EXPECT_TRUE(!failed || !claim.status.ok() || verb == Verb::kMap) << at;
    }
    EXPECT_GT(failures, 0) << "no call of verb " << static_cast<int>(verb);
  }
}

// A release does not need any lock that acquire_prefix holds throughout.
TEST_P(PrefixTest, ADonorMayBeReleasedMeanwhile) {
  Fixture f(GetParam());
  const Claim live = f.program->AcquirePrefix(Sevens(41, 8));  // adopts a slot
  WriteStamped(f.pool.get(), f.program.get(), live.slots[0], 8, 1);
  for (const bool vacated : {false, true}) {
    // Every free slot has blocks, so that one must give them up after the donor was found.
    std::vector<std::int32_t> slots;
    for (std::int64_t n = 1; n < f.geometry.max_slots; ++n) slots.push_back(f.program->Acquire(16));
    for (const std::int32_t slot : slots) f.program->Release(slot);
    bool released = false;
    f.vmm->Before(Verb::kUnmap, [&] {
      EXPECT_OK(StartRelease(*f.pool, live.slots));
      if (vacated) {
        EXPECT_OK(f.program->Vacate(live.slots[0]));
      }
      released = true;
    });
    const Claim claim = f.pool->AcquirePrefix({{Sevens(46, 9), 0}}, {});
    EXPECT_TRUE(released);
    ASSERT_TRUE(claim.status.ok()) << claim.status.message();
    EXPECT_LT(claim.sources[0], 0) << "not a fork";
    // Blocks of a draining slot are not available yet; those of a free slot are.
    EXPECT_EQ(claim.tokens[0], vacated ? 45 : 0);
    EXPECT_TRUE(AddsUp(f.pool.get()));
    EXPECT_OK(f.program->RunPrefix(claim));
    f.program->Release(claim.slots[0]);
    if (!vacated) UndoRelease(*f.pool, live.slots);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, PrefixTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
