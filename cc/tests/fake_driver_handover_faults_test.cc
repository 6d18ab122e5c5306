// Sequences handed over as handles, with a fault at every driver call in turn: both pools are unchanged, and a retry
// succeeds. Built with KVPAGE_TEST_FAKE_DRIVER.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/handles_util.h"

namespace kvpage::testing {
namespace {

// Each driver call fails once: the sender's slot stays usable, and a retry succeeds.
TEST_P(HandlesTest, AFaultAtEveryCallOfAnExport) {
  for (const bool owned : {true, false}) {
    std::int64_t n = 1;
    for (bool struck = true; struck && n < 1000; ++n) {
      End sender(geometry_);
      const std::int32_t slot = owned ? sender.BeginHandover(40, 1, 80) : sender.Begin(40, 1);
      std::vector<std::int64_t> before = sender.Accounts();
      const SlotRow row = RowOf(sender.pool.get(), slot);
      const std::int64_t faults = Fake().faults(), mapped = Fake().Report().mappings;
      Fake().FailAtAny(n, Result::kUnknown);
      HandoverPtr sent;
      const Status status = sender.pool->ExportBlocks(slot, "model", {}, &sent);
      Fake().ClearFaults();
      struck = Fake().faults() > faults;
      if (!status.ok()) {
        EXPECT_TRUE(struck) << status.message();
        EXPECT_EQ(sent, nullptr);
        EXPECT_EQ(sender.Accounts(), before) << n << ": " << status.message();
        EXPECT_EQ(RowOf(sender.pool.get(), slot).reserved, row.reserved) << n;
        EXPECT_EQ(sender.Stamped(slot, 40, 1), 40) << n;
        EXPECT_TRUE(!owned || Fake().Report().mappings == mapped) << n;
        WriteStamped(sender.pool.get(), &sender.program, slot, 10, 1);  // it may still write, and keeps its room
        sent = sender.Export(slot);
      }
      ASSERT_NE(sent, nullptr) << n;
      EXPECT_EQ(sent->copied == 0, owned) << n;
      End receiver(geometry_);
      const std::int64_t tokens = status.ok() ? 40 : 50;
      EXPECT_EQ(receiver.Stamped(receiver.Import(*sent), tokens, 1), tokens) << n;
      sender.Accounts();
    }
    EXPECT_GT(n, 10);
    EXPECT_LT(n, 1000);
  }
}

TEST_P(HandlesTest, AFaultAtEveryCallOfAnImport) {
  End sender(geometry_);
  const HandoverPtr sent = sender.Export(sender.BeginHandover(40, 1));
  ASSERT_NE(sent, nullptr);
  std::int64_t n = 1;
  int failures = 0;
  for (bool struck = true; struck && n < 1000; ++n) {
    End receiver(geometry_);
    const std::int32_t neighbour = receiver.Begin(20, 5);
    const std::vector<std::int64_t> before = receiver.Accounts();
    const std::int64_t faults = Fake().faults();
    Fake().FailAtAny(n, Result::kUnknown);
    Claim claim = receiver.pool->ImportBlocks(*sent, "model");
    Fake().ClearFaults();
    struck = Fake().faults() > faults;
    if (!claim.status.ok()) {
      ++failures;
      EXPECT_EQ(receiver.Accounts(), before) << n << ": " << claim.status.message();
      EXPECT_EQ(receiver.Stamped(neighbour, 20, 5), 20) << n;
      claim = receiver.pool->ImportBlocks(*sent, "model");
    }
    ASSERT_OK(claim.status) << n;
    ASSERT_OK(receiver.RunIn(claim));
    EXPECT_EQ(receiver.Stamped(claim.slots[0], 40, 1), 40) << n;
    receiver.Release(claim.slots[0]);
    EXPECT_EQ(Fake().Report().imported, 0) << n;
  }
  EXPECT_GT(failures, 10);
  EXPECT_LT(n, 1000);
}

TEST_P(HandlesTest, AFaultAtEveryCallOfAnAcquisition) {
  std::int64_t n = 1;
  int failures = 0;
  for (bool struck = true; struck && n < 1000; ++n) {
    End sender(geometry_);
    sender.Begin(20, 5);  // the pool's first block determines whether the driver shares memory
    const std::vector<std::int64_t> before = sender.Accounts();
    const std::int64_t faults = Fake().faults();
    Fake().FailAtAny(n, Result::kUnknown);
    Claim claim = sender.pool->AcquireHandover({40, 20});
    Fake().ClearFaults();
    struck = Fake().faults() > faults;
    if (!claim.status.ok()) {
      ++failures;
      EXPECT_TRUE(claim.slots.empty());
      EXPECT_EQ(sender.Accounts(), before) << n << ": " << claim.status.message();
      claim = sender.pool->AcquireHandover({40, 20});
    }
    ASSERT_OK(claim.status) << n;
    for (const std::int32_t slot : claim.slots) {
      for (std::int64_t range = 0; range < ranges_; ++range) {
        const char* const at = sender.pool->View().base + geometry_.Offset(slot, range, 0);
        EXPECT_EQ(std::count(at, at + geometry_.block_bytes, '\0'), geometry_.block_bytes) << n;
      }
    }
    sender.pool->UndoEdits(EditEach(SlotOpcode::kOccupy, claim.slots));
  }
  EXPECT_GT(failures, 5);
  EXPECT_LT(n, 1000);
}

INSTANTIATE_TEST_SUITE_P(Layouts, HandlesTest, ::testing::Values(Layout::kFused, Layout::kPerLayer),
                         [](const auto& info) { return info.param == Layout::kFused ? "fused" : "per_layer"; });

}  // namespace
}  // namespace kvpage::testing
