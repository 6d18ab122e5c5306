// Sequences that are found by their tokens, next to forks, truncations and failing calls: no slot writes what another
// may find, and nothing is lost.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "tests/expect_ok.h"
#include "tests/pool_util.h"
#include "tests/sharing_util.h"

namespace kvpage::testing {
namespace {

using Ids = std::vector<std::int32_t>;

Ids Same(std::int64_t count, std::int32_t id) { return Ids(static_cast<std::size_t>(count), id); }
Ids Join(Ids first, const Ids& then) {
  first.insert(first.end(), then.begin(), then.end());
  return first;
}

class PrefixSharingTest : public ::testing::TestWithParam<Layout> {
 protected:
  void Make(std::int64_t blocks) {
    pool_ = MakePool(geometry_, blocks * geometry_.num_ranges());
    program_ = std::make_unique<Program>(pool_.get());
  }
  // Writes tokens with a single id, whose keys and values carry the stamp.
  void Write(std::int32_t slot, std::int32_t count, float stamp, std::int32_t id = 7) {
    const std::int32_t length = program_->length(slot);
    EXPECT_OK(pool_->Extend({slot}, {length + count}).status);
    EXPECT_OK(program_->Write(slot, count));
    ForTokens(pool_.get(), slot, length, length + count, [&](float& at, float token) { at = 1000 * stamp + token; });
    EXPECT_OK(pool_->Commit(slot, Same(count, id)));
  }
  std::int32_t Written(const Ids& ids, float stamp) {
    const Claim claim = program_->AcquirePrefix(ids);
    EXPECT_EQ(claim.tokens[0], 0);
    Write(claim.slots[0], static_cast<std::int32_t>(ids.size()), stamp, ids[0]);
    return claim.slots[0];
  }
  std::int64_t Found(const Ids& ids) {
    std::int64_t tokens = 0;
    EXPECT_OK(pool_->FindPrefix("", ids, /*whole=*/true, &tokens));
    return tokens;
  }
  bool Holds(std::int32_t slot, std::int64_t begin, std::int64_t end, float stamp) {
    return CountStamped(pool_.get(), slot, begin, end, stamp) == end - begin;
  }
  // Releases everything, and expects each block to be freed exactly once.
  void Finish() {
    for (const SlotRow& row : pool_->Rows()) program_->Release(row.slot);
    std::int64_t freed = 0;
    EXPECT_OK(pool_->Evict(std::numeric_limits<std::int64_t>::max() / 2, &freed));
    EXPECT_OK(pool_->Trim(&freed));
    const PoolNumbers numbers = pool_->Numbers();
    EXPECT_EQ(numbers.blocks_free, numbers.blocks_total);
    EXPECT_EQ(numbers.blocks_cached, 0);
    EXPECT_EQ(numbers.prefix_tokens, 0);
  }

  const Geometry geometry_ = SmallGeometry(GetParam());
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<Program> program_;
};

TEST_P(PrefixSharingTest, ATruncationThatFailedLeavesNoEntriesToWriteUnder) {
  Make(6);
  const std::int32_t slot = Written(Same(64, 7), 1);
  const std::int32_t fork = program_->Fork(slot);
  EXPECT_EQ(pool_->Truncate({slot}, {16}).status.reason(), Reason::kOutOfBlocks);
  EXPECT_EQ(Found(Same(64, 7)), 64);
  program_->Release(fork);
  program_->Truncate(slot, 16);
  Write(slot, 40, 2, 9);
  EXPECT_EQ(Found(Same(64, 7)), 16);
  EXPECT_EQ(Found(Join(Same(16, 7), Same(40, 9))), 56);
  EXPECT_TRUE(AddsUp(pool_.get()));
  Finish();
}

TEST_P(PrefixSharingTest, ATruncationThatIsTakenBackKeepsItsEntries) {
  Make(24);
  const std::int32_t slot = Written(Same(64, 7), 1);
  const std::int32_t fork = program_->Fork(slot);
  EXPECT_OK(pool_->Truncate({slot}, {16}).status);
  pool_->UndoEdits({{static_cast<std::int32_t>(SlotOpcode::kTruncate), slot, 16}});
  program_->Release(fork);
  EXPECT_EQ(Found(Same(64, 7)), 64);
  program_->Truncate(slot, 20);
  Write(slot, 40, 2, 9);
  EXPECT_EQ(Found(Same(64, 7)), 20);
  Finish();
}

// The index has the first block of one slot and later blocks of a second slot, which computed the first one too.
TEST_P(PrefixSharingTest, BlocksBehindOnesThatAreNotSharedStayApart) {
  Make(24);
  const Ids text = Same(65, 7);
  const std::int32_t first = program_->AcquirePrefix(text).slots[0], second = program_->AcquirePrefix(text).slots[0];
  Write(first, 16, 1);
  EXPECT_EQ(Found(text), 16);
  Write(second, 48, 1);
  EXPECT_EQ(Found(text), 48);
  const std::int32_t fork = program_->Fork(second);
  Write(fork, 16, 1);
  program_->Release(fork);
  // The fork's slot gives up its blocks.
  const std::vector<std::int32_t> others = {program_->Acquire(16), program_->Acquire(16)};
  program_->Release(others[0]);
  const Claim reader = program_->AcquirePrefix(text);
  ASSERT_EQ(reader.tokens[0], 64);
  EXPECT_TRUE(Holds(reader.slots[0], 0, 64, 1));
  program_->Truncate(second, 20);
  Write(second, 40, 2, 9);
  EXPECT_TRUE(Holds(second, 20, 60, 2));
  EXPECT_TRUE(Holds(reader.slots[0], 0, 64, 1));
  EXPECT_EQ(Found(text), 64);
  Finish();
}

TEST_P(PrefixSharingTest, ASlotIsAdoptedByOneRequestOfACall) {
  Make(24);
  const std::int32_t parked = Written(Same(32, 7), 1);
  program_->Release(parked);
  const Claim claim = pool_->AcquirePrefix({{Join(Same(32, 7), {8}), 0}, {Join(Same(32, 7), {9}), 0}}, {});
  ASSERT_TRUE(claim.status.ok()) << claim.status.message();
  EXPECT_EQ(claim.tokens, (std::vector<std::int64_t>{32, 32}));
  EXPECT_NE(claim.slots[0], claim.slots[1]);
  EXPECT_TRUE(claim.slots[0] == parked || claim.slots[1] == parked);
}

TEST_P(PrefixSharingTest, ParkedAndCachedBlocksMeetOneClaim) {
  Make(8);
  const std::int32_t cached = Written(Same(64, 7), 1);
  program_->Release(cached);
  const std::vector<std::int32_t> all = {program_->Acquire(16), program_->Acquire(16), program_->Acquire(16),
                                         program_->Acquire(16)};  // the last slot had the sequence
  EXPECT_EQ(Found(Same(64, 7)), 64);
  for (const std::int32_t slot : all) program_->Release(slot);
  EXPECT_EQ(pool_->Numbers().blocks_free, 0);
  EXPECT_OK(pool_->CanAcquire({128}).status);
  EXPECT_EQ(Found(Same(64, 7)), 64) << "can_acquire changes nothing";
  const Claim claim = pool_->Acquire({128});
  ASSERT_TRUE(claim.status.ok()) << claim.status.message();
  EXPECT_OK(program_->Occupy(claim.slots[0]));
  EXPECT_EQ(Found(Same(64, 7)), 0);
}

TEST_P(PrefixSharingTest, ARequestThatFailsLosesNothing) {
  Make(8);
  const std::int32_t parked = Written(Same(64, 7), 1);
  program_->Release(parked);
  const std::int32_t live = program_->Acquire(64);
  // Half of the sequence is requested, with more room than there is: adopting the slot would not help.
  const Claim claim = pool_->AcquirePrefix({{Join(Same(32, 7), {8}), 128}}, {});
  EXPECT_EQ(claim.status.reason(), Reason::kOutOfBlocks);
  EXPECT_EQ(Found(Same(64, 7)), 64);
  program_->Release(live);
  EXPECT_OK(program_->AcquirePrefix(Join(Same(64, 7), {8}), 128).status);
}

INSTANTIATE_TEST_SUITE_P(Layouts, PrefixSharingTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

}  // namespace
}  // namespace kvpage::testing
