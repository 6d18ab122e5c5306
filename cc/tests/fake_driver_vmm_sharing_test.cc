// CudaVmm on the fake driver: one block at several places, copies and exchanges, with each of their calls failing.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/cuda_vmm_world.h"

namespace kvpage {
namespace {

TEST(FakeDriverVmmSharingTest, CopiesTakeThePlaceOfSharedBlocks) {
  Mapped world;
  const FakeDriver::State before = world.fake->Report();
  EXPECT_OK(world.vmm->MapReadOnly(16 * kBlock, Blocks{2, 4}.data(), 2));
  EXPECT_OK(world.vmm->Copy(Blocks{2, 4}.data(), Blocks{5, 5}.data(), 2));
  EXPECT_EQ(world.fake->Report().mappings, before.mappings + 2) << "the places of a copy are holes again";
  EXPECT_OK(world.vmm->Remap(17 * kBlock, Blocks{4}.data(), Blocks{5}.data(), 1));
  EXPECT_EQ(static_cast<int>(world.At(17)[kBlock - 1]), 4);
  std::memset(world.At(17), 9, kBlock);
  EXPECT_EQ(static_cast<int>(world.At(2)[0]), 4) << "the other slot's";
  EXPECT_EQ(static_cast<int>(world.At(16)[0]), 2);
  EXPECT_OK(world.Unmap(16, {2, 5}));
  EXPECT_EQ(world.fake->Report().mappings, before.mappings);
}

// Programs may be using such a block: between an unmap and a map it would be gone.
TEST(FakeDriverVmmSharingTest, ABlockThatDoesNotChangeStaysMapped) {
  Mapped world;
  EXPECT_OK(world.vmm->MapReadOnly(16 * kBlock, Blocks{2, 4}.data(), 2));
  const std::int64_t calls = world.vmm->system_calls();
  EXPECT_OK(world.vmm->Remap(16 * kBlock, Blocks{2, 4}.data(), Blocks{2, 4}.data(), 2));
  EXPECT_EQ(world.vmm->system_calls(), calls);
  std::memset(world.At(17), 9, kBlock);
  EXPECT_EQ(static_cast<int>(world.At(2)[0]), 9) << "and may be written";
}

TEST(FakeDriverVmmSharingTest, ExchangesThatFailLeaveWhatWasMapped) {
  for (const Call call : {Call::kMemMap, Call::kMemUnmap, Call::kMemSetAccess, Call::kMemcpyDtoDAsync}) {
    bool failed = true;
    for (int n = 1; failed; ++n) {
      ASSERT_LT(n, 9);
      Mapped world;
      EXPECT_OK(world.vmm->MapReadOnly(16 * kBlock, Blocks{2, 4}.data(), 2));
      const std::int64_t mappings = world.fake->Report().mappings;
      world.fake->FailAt(call, n, Result::kUnknown);
      Status status = world.vmm->Copy(Blocks{4}.data(), Blocks{5}.data(), 1);
      if (status.ok()) status = world.vmm->Remap(17 * kBlock, Blocks{4}.data(), Blocks{5}.data(), 1);
      world.fake->ClearFaults();
      failed = !status.ok();
      EXPECT_EQ(static_cast<int>(world.At(16)[0]), 2);
      EXPECT_EQ(static_cast<int>(world.At(17)[0]), 4) << n;
      // The next exchange succeeds, and cleans up what this one could not.
      EXPECT_OK(world.vmm->Copy(Blocks{2}.data(), Blocks{1}.data(), 1));
      EXPECT_EQ(world.fake->Report().mappings, mappings) << n;
      EXPECT_EQ(static_cast<int>(world.At(8)[7]), 2);
      EXPECT_OK(world.Unmap(16, {2, failed ? 4 : 5}));
    }
  }
}

}  // namespace
}  // namespace kvpage
