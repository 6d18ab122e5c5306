// The block window of CudaVmm on the fake driver: every existing block is in it at its number, whatever happens to the
// others, and a failing call leaves the window unchanged.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "tests/cuda_vmm_world.h"

namespace kvpage {
namespace {

struct Windowed : Mapped {
  explicit Windowed(bool open = true) {
    if (open) {
      EXPECT_OK(Open());
    }
  }
  Status Open() { return vmm->Window(&window); }
  // Returns the first and last byte of a block, or -1 if they differ.
  int Shows(std::int64_t block) const {
    const char* const at = window + block * kBlock;
    return at[0] == at[kBlock - 1] ? at[0] : -1;
  }
  // Expects the contents that Mapped has written.
  void ExpectBlocks() const {
    for (int block = 0; block < 5; ++block) EXPECT_EQ(Shows(block), block);
  }

  char* window = nullptr;
};

TEST(FakeDriverWindowTest, IsReservedWhenItIsAskedFor) {
  Windowed world(/*open=*/false);
  const FakeDriver::State before = world.fake->Report();
  EXPECT_OK(world.Create({9}));
  EXPECT_EQ(world.fake->Report().mappings, before.mappings) << "no mapping before anybody wants a window";
  EXPECT_OK(world.Open());
  EXPECT_EQ(world.fake->Report().reservations, before.reservations + 1);
  EXPECT_EQ(world.fake->Report().mappings, before.mappings + 7);
  EXPECT_EQ(world.fake->calls(Call::kMemSetAccess), 3 + 2) << "once for each run of blocks: 0 to 5, and 9";
  world.ExpectBlocks();
  std::memset(world.window + 3 * kBlock, 77, kBlock);
  EXPECT_EQ(static_cast<int>(world.At(9)[5]), 77) << "the same memory";
  EXPECT_EQ(static_cast<int>(world.At(12)[5]), 77);
  const std::int64_t calls = world.vmm->system_calls();
  char* again = nullptr;
  EXPECT_OK(world.vmm->Window(&again));
  EXPECT_EQ(again, world.window);
  EXPECT_EQ(world.vmm->system_calls(), calls);
}

TEST(FakeDriverWindowTest, FollowsWhatIsCreatedAndDestroyed) {
  Windowed world;
  const std::int64_t mappings = world.fake->Report().mappings;
  EXPECT_OK(world.Create({12, 7, 8}));
  EXPECT_EQ(world.fake->Report().mappings, mappings + 3);
  for (const int block : {7, 8, 12}) std::memset(world.window + block * kBlock, block, kBlock);
  EXPECT_OK(world.Map(20, {8, 12, 7}));
  EXPECT_EQ(static_cast<int>(world.At(21)[9]), 12);
  EXPECT_OK(world.Unmap(20, {8, 12, 7}));
  EXPECT_EQ(world.Shows(8), 8) << "unmapped elsewhere";
  EXPECT_OK(world.Destroy({8}));
  EXPECT_EQ(world.fake->Report().mappings, mappings + 2);
  EXPECT_OK(world.Create({8}));
  EXPECT_EQ(world.Shows(8), -1) << "new memory";
  char* const window = world.window;
  EXPECT_OK(world.vmm->Grow(40));
  EXPECT_OK(world.Open());
  EXPECT_EQ(world.window, window) << "reserved for the whole device";
  EXPECT_OK(world.Create({39}));
  std::memset(window + 39 * kBlock, 39, kBlock);
  EXPECT_OK(world.Map(0 + 24, {39}));
  EXPECT_EQ(static_cast<int>(world.At(24)[1]), 39);
  world.ExpectBlocks();
}

TEST(FakeDriverWindowTest, HasRoomForTheDeviceAndNoMore) {
  FakeDriver::Options options = World::DefaultOptions();
  options.device_bytes = 20 * kBlock;
  World world(options);
  EXPECT_OK(world.Make());
  EXPECT_OK(world.vmm->Grow(4));
  char* window = nullptr;
  EXPECT_OK(world.vmm->Window(&window));
  EXPECT_OK(world.vmm->Grow(20));
  const Status status = world.vmm->Grow(21);
  EXPECT_TRUE(Mentions(status, "room for 20 blocks") && Mentions(status, "21 wanted")) << status.message();
}

// Runs an operation repeatedly, with its n-th driver call failing, until it succeeds.
void AtEveryCall(bool open, const std::function<Status(Windowed*)>& operation, std::int64_t wanted_calls) {
  for (const Result code : {Result::kUnknown, Result::kOutOfMemory}) {
    for (std::int64_t n = 1;; ++n) {
      Windowed world(open);
      const std::vector<std::int64_t> before = world.State();
      world.fake->FailAtAny(n, code);
      const Status status = operation(&world);
      const bool failed = world.fake->faults() > 0;
      world.fake->ClearFaults();
      if (!failed) {
        EXPECT_OK(status);
        EXPECT_EQ(n - 1, wanted_calls);
        break;
      }
      EXPECT_FALSE(status.ok()) << n;
      EXPECT_EQ(world.State(), before) << "call " << n << " " << status.message();
      if (open) world.ExpectBlocks();
      EXPECT_OK(operation(&world)) << "after call " << n;
      world.ExpectBlocks();
    }
  }
}

TEST(FakeDriverWindowTest, OpeningIsAllOrNone) {
  // The context, the reservation, six mappings, access for the run.
  AtEveryCall(false, [](Windowed* world) { return world->Open(); }, 9);
}
TEST(FakeDriverWindowTest, CreateIsAllOrNone) {
  // The context, four blocks, four mappings, three runs.
  AtEveryCall(true, [](Windowed* world) { return world->Create({6, 9, 10, 13}); }, 12);
}

TEST(FakeDriverWindowTest, ABlockThatCannotBeGivenBackComesBackWhole) {
  for (const Call call : {Call::kMemUnmap, Call::kMemRelease}) {
    Windowed world;
    EXPECT_OK(world.Unmap(0, {0, 2, 4}));
    world.fake->FailAt(call, 2, Result::kUnknown);
    EXPECT_FALSE(world.Destroy({0, 2, 4}).ok());
    EXPECT_EQ(world.vmm->PhysicalBytes(), 4 * kBlock) << "the others went";
    EXPECT_OK(world.Create({0, 2, 4}));
    EXPECT_EQ(world.Shows(2), 2) << "2 is still there, and in the window";
    for (const int block : {0, 4}) std::memset(world.window + block * kBlock, block, kBlock);
    world.ExpectBlocks();
  }
}

// A block has memory but is not in the window, because neither its mapping nor its release succeeded. Requesting the
// window again maps it. If that fails too, the window stays for those who have its address.
TEST(FakeDriverWindowTest, AFailureLeavesAWindowThatIsInUse) {
  Windowed world;
  world.fake->FailAt(Call::kMemMap, 1, Result::kUnknown);
  world.fake->FailAt(Call::kMemRelease, 1, Result::kUnknown);
  EXPECT_FALSE(world.Create({9}).ok());
  world.fake->ClearFaults();
  EXPECT_EQ(world.vmm->PhysicalBytes(), 7 * kBlock) << "block 9 has memory";
  const FakeDriver::State before = world.fake->Report();
  world.fake->FailAt(Call::kMemMap, 1, Result::kOutOfMemory);
  char* again = nullptr;
  EXPECT_FALSE(world.vmm->Window(&again).ok());
  world.fake->ClearFaults();
  ASSERT_EQ(world.fake->Report().reservations, before.reservations);
  ASSERT_EQ(world.fake->Report().mappings, before.mappings);
  world.ExpectBlocks();
  EXPECT_OK(world.vmm->Window(&again));
  EXPECT_EQ(again, world.window);
  EXPECT_EQ(world.fake->Report().mappings, before.mappings + 1) << "block 9";
}

// Access cannot be set, and then one mapping cannot be undone: it must not be mistaken for a usable one.
TEST(FakeDriverWindowTest, AFailedRollbackIsMadeUpForLater) {
  for (const bool open : {false, true}) {
    Windowed world(open);
    const auto act = [&] { return open ? world.Create({6, 7, 8}) : world.Open(); };
    world.fake->FailAt(Call::kMemSetAccess, 1, Result::kUnknown);
    world.fake->FailAt(Call::kMemUnmap, 2, Result::kUnknown);
    EXPECT_FALSE(act().ok());
    world.fake->ClearFaults();
    EXPECT_OK(act());
    world.ExpectBlocks();
    if (open) std::memset(world.window + 6 * kBlock, 1, 3 * kBlock);
    EXPECT_EQ(world.fake->Report().violations, 0) << world.fake->Report().ToString();
  }
}

}  // namespace
}  // namespace kvpage
