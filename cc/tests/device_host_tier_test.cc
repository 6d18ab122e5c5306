// Prefixes of pools on a device that are written to host memory before they are evicted, with the kernels (on the
// emulated device) and the copies of the fake driver.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/host_tier.h"
#include "tests/device_swapping_util.h"
#include "tests/text.h"

namespace kvpage::testing {
namespace {

using Ids = std::vector<std::int32_t>;

class TierRig : public SwappingRig {
 public:
  explicit TierRig(Layout layout, double write_ahead = 1, std::int64_t store_blocks = 64)
      : SwappingRig(layout, store_blocks) {
    EXPECT_OK(pool().AttachStore(std::make_shared<store::HostTier>(store_ptr()), write_ahead));
  }

  // Starts a sequence, finds what it can (`found` tokens) and writes the rest, with the same contents in every run.
  std::int32_t Begin(const Ids& ids, std::int64_t* found) {
    const Claim claim = pool().AcquirePrefix({{ids, 0}}, {});
    EXPECT_OK(claim.status);
    if (!claim.status.ok()) return -1;
    return Begin(claim, ids, found);
  }
  std::int32_t Begin(const Claim& claim, const Ids& ids, std::int64_t* found) {
    const std::int32_t slot = claim.slots[0];
    *found = claim.tokens[0];
    const SlotOpcode opcode = *found > 0 ? SlotOpcode::kFound : SlotOpcode::kOccupy;
    Edit(DeviceOp::kAcquirePrefix, {static_cast<std::int32_t>(opcode), slot, static_cast<std::int32_t>(*found)});
    EXPECT_OK(pool().Extend({slot}, {static_cast<std::int64_t>(ids.size())}).status);
    for (auto token = static_cast<std::size_t>(*found); token < ids.size(); ++token) {
      Write(slot, 1, static_cast<float>(100 * ids[0]), /*commit=*/false);
    }
    EXPECT_OK(pool().Commit(slot, {ids.begin() + *found, ids.end()}));
    return slot;
  }
  void End(std::int32_t slot) {
    EXPECT_OK(StartRelease(pool(), {slot}));
    Edit(DeviceOp::kRelease, {static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
  }
  std::vector<char> Run(const Ids& ids, std::int64_t* found) {
    const std::int32_t slot = Begin(ids, found);
    EXPECT_EQ(length(slot), static_cast<std::int32_t>(ids.size()));
    std::vector<char> bytes = Bytes(slot, static_cast<std::int64_t>(ids.size()));
    End(slot);
    return bytes;
  }
  // Makes the pool notice that the slot is free.
  void Look() { EXPECT_OK(pool().TakeFault()); }
  prefix::SpillNumbers Spills() { return pool().StoreNumbers().spills; }
  bool Written(std::int64_t blocks) {
    Look();
    return Soon([&] { return Spills().tokens == 16 * blocks; });
  }
  void EvictAll() {
    std::int64_t freed = 0;
    EXPECT_OK(pool().Evict(1000, &freed));
    EXPECT_EQ(pool().Numbers().blocks_cached, 0);
  }
  std::int64_t Fetch(const Ids& ids, std::string* error = nullptr) {
    std::shared_ptr<prefix::FetchTicket> ticket;
    EXPECT_OK(pool().Prefetch({"", ids, 0}, &ticket));
    EXPECT_TRUE(ticket->Wait(60));
    if (error != nullptr) *error = ticket->error();
    return ticket->tokens();
  }
};

class DeviceHostTierTest : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, DeviceHostTierTest, ::testing::Values(Layout::kFused, Layout::kPerLayer));

TEST_P(DeviceHostTierTest, EvictedPrefixesComeBackBitForBit) {
  TierRig rig(GetParam());
  std::int64_t found = -1;
  std::vector<std::vector<char>> before;
  for (std::int32_t i = 1; i <= 3; ++i) {
    before.push_back(rig.Run(Text(i, 4), &found));
    EXPECT_EQ(found, 0);
  }
  ASSERT_TRUE(rig.Written(12)) << rig.store().Numbers().prefixes.last_error;
  rig.EvictAll();
  EXPECT_EQ(rig.pool().StoreNumbers().unwritten_evictions, 0);
  EXPECT_EQ(rig.pool().Numbers().blocks_free, rig.pool().Numbers().blocks_total);
  // Their memory is used by others meanwhile.
  rig.Run(Text(9, 7), &found);
  rig.Run(Text(8, 7), &found);
  ASSERT_TRUE(rig.Written(26));
  const Claim claim = rig.pool().AcquirePrefix({{Text(2, 4), 0}}, {});
  EXPECT_EQ(claim.tokens[0], 0);
  EXPECT_EQ(claim.stored[0], 64);
  rig.End(rig.Begin(claim, {2}, &found));
  for (const std::int32_t i : {2, 1, 3}) {
    EXPECT_EQ(rig.Fetch(Text(i, 4)), 64) << i;
    EXPECT_EQ(rig.Run(Text(i, 4), &found), before[i - 1]) << i;
    EXPECT_EQ(found, 64) << i;
    rig.Look();
  }
  EXPECT_EQ(rig.pool().StoreNumbers().store_hits, 3 * 64);
  EXPECT_TRUE(rig.Adds());
}

// The store's threads look at the pool, but errors on the device are reported by the pool's own calls.
TEST_P(DeviceHostTierTest, AFaultIsLeftToThePoolsCalls) {
  TierRig rig(GetParam());
  std::int64_t found = 0;
  const std::int32_t slot = rig.Begin(Text(1, 2), &found), other = rig.Begin(Text(2, 3), &found);
  rig.End(slot);
  rig.Write(other, 60, 1, /*commit=*/false);  // beyond its room
  ASSERT_TRUE(Soon([&] {
    static_cast<void>(rig.pool().Numbers());  // looks, and notices that the slot is free
    return rig.Spills().tokens == 32;
  }));
  EXPECT_EQ(rig.pool().TakeFault().reason(), Reason::kDeviceFault);
}

TEST_P(DeviceHostTierTest, NothingIsTakenBeforeTheReleaseHasRun) {
  TierRig rig(GetParam());
  std::int64_t found = 0;
  const std::int32_t slot = rig.Begin(Text(1, 3), &found);
  rig.Look();
  EXPECT_OK(StartRelease(rig.pool(), {slot}));
  rig.Look();
  Pause();
  EXPECT_EQ(rig.Spills().tokens, 0);
  const std::vector<char> before = rig.Bytes(slot, 48);
  rig.Edit(DeviceOp::kRelease, {static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
  ASSERT_TRUE(rig.Written(3));
  rig.EvictAll();
  EXPECT_EQ(rig.Fetch(Text(1, 3)), 48);
  const std::int32_t back = rig.Begin(Text(1, 3), &found);
  EXPECT_EQ(found, 48);
  EXPECT_EQ(rig.Bytes(back, 48), before);
}

TEST_P(DeviceHostTierTest, BesideACapture) {
  TierRig rig(GetParam());
  std::int64_t found = 0;
  const std::vector<char> before = rig.Run(Text(1, 4), &found);
  const cu::Stream stream = rig.machine().NewStream();
  std::thread([&] { rig.fake().BeginCapture(stream, FakeDriver::CaptureMode::kThreadLocal); }).join();
  ASSERT_TRUE(rig.Written(4)) << rig.store().Numbers().prefixes.last_error;
  rig.EvictAll();
  EXPECT_EQ(rig.Fetch(Text(1, 4)), 64);
  EXPECT_EQ(rig.Run(Text(1, 4), &found), before);
  EXPECT_EQ(found, 64);
  EXPECT_NE(rig.fake().EndCapture(stream), nullptr) << rig.fake().Report().ToString();
}

// Fails the n-th driver call, whichever it is and whoever makes it: at worst there is a miss.
TEST_P(DeviceHostTierTest, AFaultAtEveryCall) {
  int failures = 0, unwritten = 0, missed = 0, n = 1;
  const Ids ids = Text(3, 3);
  for (bool struck = true; struck && n < 400; ++n) {
    TierRig rig(GetParam());
    std::int64_t found = 0;
    const std::vector<char> before = rig.Run(ids, &found);
    const std::int64_t faults = rig.fake().faults();
    rig.fake().FailAtAny(n, cu::Result::kUnknown);
    const auto twice = [&](const auto& call) {
      if (const Status status = call(); status.ok()) return;
      ++failures;
      EXPECT_TRUE(rig.Adds()) << n;
      EXPECT_OK(call()) << n;
    };
    twice([&] { return rig.pool().TakeFault(); });
    EXPECT_TRUE(Soon([&] { return rig.Spills().tokens == 48 || rig.Spills().failed == 1; })) << n;
    unwritten += rig.Spills().tokens == 0;
    EXPECT_TRUE(rig.Adds()) << n;
    std::int64_t freed = 0;
    twice([&] { return rig.pool().Evict(1000, &freed); });
    std::shared_ptr<prefix::FetchTicket> ticket;
    for (bool first = true; first || (rig.Spills().tokens == 48 && ticket->tokens() == 0); first = false) {
      if (!first) ++missed;
      twice([&] { return rig.pool().Prefetch({"", ids, 0}, &ticket); });
      ASSERT_TRUE(ticket->Wait(60)) << n;
      EXPECT_EQ(ticket->tokens() == 48, ticket->error().empty() && rig.Spills().tokens == 48) << n << ticket->error();
      EXPECT_TRUE(rig.Adds()) << n;
    }
    Claim claim;
    twice([&] { return (claim = rig.pool().AcquirePrefix({{ids, 49}}, {})).status; });
    struck = rig.fake().faults() > faults;
    rig.fake().ClearFaults();
    ASSERT_FALSE(claim.slots.empty()) << n;
    const std::int32_t slot = rig.Begin(claim, ids, &found);
    EXPECT_EQ(found, rig.Spills().tokens) << n;
    EXPECT_EQ(rig.Bytes(slot, 49), before) << n;
    EXPECT_OK(rig.pool().TakeFault());
    rig.End(slot);
    rig.Look();
    EXPECT_TRUE(rig.Adds()) << n;
  }
  EXPECT_LT(n, 400);
  EXPECT_GT(failures, 3);
  EXPECT_GT(unwritten, 3) << "buffers and copies to the host";
  EXPECT_GT(missed, 1) << "copies back";
}

}  // namespace
}  // namespace kvpage::testing
