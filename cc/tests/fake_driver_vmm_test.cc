// CudaVmm on the fake driver: its driver calls, and that a call that can fail leaves everything unchanged when it does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "tests/cuda_vmm_world.h"
#include "tests/expect_ok.h"
#include "vmm/cuda_vmm.h"

namespace kvpage {
namespace {

TEST(FakeDriverVmmTest, BlocksAreMappedOneByOneAndAllowedAtOnce) {
  World world;
  EXPECT_OK(world.Make());
  EXPECT_TRUE(world.vmm->shareable());
  EXPECT_OK(world.vmm->Grow(8));
  EXPECT_OK(world.Create({0, 1, 5}));
  EXPECT_EQ(world.vmm->PhysicalBytes(), 3 * kBlock);
  EXPECT_EQ(world.fake->calls(Call::kMemCreate), 3);
  const std::int64_t before = world.vmm->system_calls();
  EXPECT_OK(world.Map(4, {5, 0, 1, 5}));
  EXPECT_EQ(world.fake->calls(Call::kMemMap), 4);
  EXPECT_EQ(world.fake->calls(Call::kMemSetAccess), 1);
  EXPECT_EQ(world.vmm->system_calls() - before, 5);
  std::memset(world.At(4), 42, kBlock);
  EXPECT_EQ(static_cast<int>(world.At(7)[99]), 42) << "the same block at two addresses";
  EXPECT_OK(world.vmm->Fill(5 * kBlock, 2 * kBlock, 3));
  EXPECT_EQ(world.fake->calls(Call::kStreamSynchronize), 1) << "done when it returns";
  EXPECT_EQ(static_cast<int>(world.At(6)[kBlock - 1]), 3);
  EXPECT_EQ(static_cast<int>(world.At(7)[0]), 42);
  EXPECT_OK(world.Unmap(4, {5, 0}));
  EXPECT_EQ(world.fake->calls(Call::kMemUnmap), 2);
  EXPECT_OK(world.Map(0, {0}));
  EXPECT_EQ(static_cast<int>(world.At(0)[7]), 3) << "unmapped blocks keep what they hold";
  EXPECT_OK(world.vmm->Move(6 * kBlock, 20 * kBlock, Blocks{1, 5}.data(), 2));
  EXPECT_EQ(static_cast<int>(world.At(21)[7]), 42);
  EXPECT_OK(world.Unmap(20, {1}));
  EXPECT_OK(world.Destroy({1}));
  EXPECT_EQ(world.vmm->PhysicalBytes(), 2 * kBlock);
  // ~World checks that the rest is freed too, mapped or not.
}

TEST(FakeDriverVmmTest, NoCallNoContextNoHarm) {
  World world;
  EXPECT_OK(world.Make());
  const std::int64_t before = world.fake->total_calls();
  EXPECT_OK(world.Map(0, {}));
  EXPECT_OK(world.Unmap(0, {}));
  EXPECT_OK(world.Destroy({}));
  EXPECT_OK(world.vmm->Fill(0, 0, 1));
  EXPECT_EQ(world.fake->total_calls(), before);
}

TEST(FakeDriverVmmTest, BlockSizesMustSuitTheDriver) {
  World world;
  const auto make = [&](std::int64_t virtual_bytes, std::int64_t block_bytes) {
    return CudaVmm::Make(world.context, virtual_bytes, block_bytes, &world.vmm);
  };
  for (const std::int64_t odd : {std::int64_t{0}, kBlock / 4, kBlock / 2 + 4096, -kBlock}) {
    const Status status = make(kPlaces * kBlock, odd);
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << odd << " " << status.message();
    EXPECT_TRUE(Mentions(status, "multiples of " + std::to_string(kBlock / 2))) << status.message();
  }
  EXPECT_EQ(make(kBlock + 4096, kBlock).code(), Code::kInvalidArgument);
  EXPECT_OK(make(3 * kBlock, kBlock / 2 * 3)) << "any multiple of the granularity will do";
}

TEST(FakeDriverVmmTest, DevicesWithoutVirtualMemoryAreRefused) {
  FakeDriver::Options options;
  options.virtual_memory = false;
  World world(options);
  EXPECT_TRUE(Mentions(world.Make(), "no virtual memory management"));
}

TEST(FakeDriverVmmTest, DevicesAreDescribedAndCounted) {
  FakeDriver::Options options;
  options.devices = 2;
  World world(options);
  int count = 0;
  EXPECT_OK(CountDevices(world.fake->driver(), &count));
  EXPECT_EQ(count, 2);
  DeviceDescription device;
  EXPECT_OK(DescribeDevice(world.fake->driver(), 1, &device));
  EXPECT_EQ(device.name, std::string("fake GPU 1"));
  EXPECT_EQ(device.granularity, std::int64_t{2} << 20);
  EXPECT_EQ(device.total_bytes, options.device_bytes);
  EXPECT_TRUE(device.virtual_memory && device.posix_handles && device.major == 9);
  const Status status = DescribeDevice(world.fake->driver(), 2, &device);
  EXPECT_TRUE(status.code() == Code::kInvalidArgument && Mentions(status, "2 are visible")) << status.message();
  std::shared_ptr<CudaContext> context;
  EXPECT_FALSE(CudaContext::Make(world.fake->driver(), -1, &context).ok());
}

TEST(FakeDriverVmmTest, EachDeviceHasItsOwnMemory) {
  FakeDriver::Options options = World::DefaultOptions();
  options.devices = 2;
  options.device_bytes = 4 * kBlock;
  World world(options);
  EXPECT_OK(world.Make());
  EXPECT_OK(world.vmm->Grow(8));
  EXPECT_OK(world.Create({0, 1, 2, 3}));
  std::shared_ptr<CudaContext> context;
  EXPECT_OK(CudaContext::Make(world.fake->driver(), 1, &context));
  std::unique_ptr<CudaVmm> second;
  EXPECT_OK(CudaVmm::Make(context, kPlaces * kBlock, kBlock, &second));
  EXPECT_OK(second->Grow(4));
  const Blocks blocks = {0, 1, 2, 3};
  EXPECT_OK(second->Create(blocks.data(), 4));
  EXPECT_OK(second->Map(0, blocks.data(), 4));
  EXPECT_OK(second->Fill(0, 4 * kBlock, 1));
}

TEST(FakeDriverVmmTest, HandlesAreShareableWhereThatIsAllowed) {
  FakeDriver::Options cannot = World::DefaultOptions(), denied = cannot;
  cannot.posix_handles = false;
  denied.posix_handles_denied = true;
  for (const FakeDriver::Options& options : {cannot, denied}) {
    World world(options);
    EXPECT_OK(world.Make());
    EXPECT_OK(world.vmm->Grow(4));
    EXPECT_OK(world.Create({0, 1, 2}));
    EXPECT_FALSE(world.vmm->shareable());
    EXPECT_EQ(world.fake->calls(Call::kMemCreate), options.posix_handles_denied ? 4 : 3) << "asked once";
  }
}

TEST(FakeDriverVmmTest, OutOfMemoryTellsWhatToDo) {
  FakeDriver::Options options = World::DefaultOptions();
  options.device_bytes = 4 * kBlock;
  World world(options);
  EXPECT_OK(world.Make());
  EXPECT_OK(world.vmm->Grow(8));
  const Status status = world.Create({0, 1, 2, 3, 4, 5});
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  for (const char* text :
       {"block 5 of 6", "cuMemCreate of 65536 bytes", "CUDA_ERROR_OUT_OF_MEMORY (2", "0 bytes free of 262144", "75%",
        "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE=false"}) {
    EXPECT_TRUE(Mentions(status, text)) << text << " in " << status.message();
  }
  EXPECT_EQ(world.vmm->PhysicalBytes(), 0) << "all or none";
  EXPECT_OK(world.Create({0, 1, 2, 3}));
  world.fake->FailAt(Call::kMemAddressReserve, 1, Result::kOutOfMemory);
  std::unique_ptr<CudaVmm> second;
  EXPECT_TRUE(Mentions(CudaVmm::Make(world.context, kBlock, kBlock, &second), "fewer slots"));
}

// Runs an operation repeatedly, with its n-th driver call failing, until it succeeds.
void AtEveryCall(const std::function<Status(Mapped*)>& operation, std::int64_t wanted_calls) {
  for (const Result code : {Result::kUnknown, Result::kOutOfMemory, Result::kInvalidValue}) {
    for (std::int64_t n = 1;; ++n) {
      Mapped world;
      const std::vector<std::int64_t> before = world.State();
      world.fake->FailAtAny(n, code);
      const Status status = operation(&world);
      if (world.fake->faults() == 0) {
        world.fake->ClearFaults();
        EXPECT_OK(status);
        EXPECT_EQ(n - 1, wanted_calls);
        break;
      }
      world.fake->ClearFaults();
      EXPECT_EQ(status.code(), (code == Result::kOutOfMemory ? Code::kResourceExhausted : Code::kInternal))
          << n << " " << status.message();
      EXPECT_EQ(world.State(), before) << "call " << n << " " << status.message();
      EXPECT_OK(operation(&world)) << "after call " << n;
    }
  }
}

TEST(FakeDriverVmmTest, CreateIsAllOrNone) {
  AtEveryCall([](Mapped* world) { return world->Create({6, 9, 10, 7}); }, 5);
}
TEST(FakeDriverVmmTest, MapIsAllOrNone) {
  AtEveryCall([](Mapped* world) { return world->Map(3, {5, 0, 5}); }, 5);
}
TEST(FakeDriverVmmTest, UnmapIsAllOrNone) {
  AtEveryCall([](Mapped* world) { return world->Unmap(0, {0, 2, 4}); }, 4);
}
TEST(FakeDriverVmmTest, MoveIsAllOrNone) {
  const Blocks blocks = {2, 4};
  AtEveryCall([&](Mapped* world) { return world->vmm->Move(kBlock, 20 * kBlock, blocks.data(), 2); }, 7);
}
TEST(FakeDriverVmmTest, FillIsAllOrNone) {
  AtEveryCall([](Mapped* world) { return world->vmm->Fill(0, kBlock, 0); }, 3);
}

TEST(FakeDriverVmmTest, MakingOneIsAllOrNone) {
  std::int64_t n = 1;
  for (;; ++n) {
    World world;
    const FakeDriver::State before = world.fake->Report();
    world.fake->FailAtAny(n, Result::kUnknown);
    const Status status = world.Make();
    world.fake->ClearFaults();
    if (world.fake->faults() == 0) break;
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(world.fake->Report().ToString(), before.ToString()) << n;
    EXPECT_OK(world.Make());
  }
  EXPECT_GT(n, 5);
}

TEST(FakeDriverVmmTest, WhatCannotBeGivenBackIsKept) {
  Mapped world;
  EXPECT_OK(world.Unmap(0, {0, 2, 4}));
  world.fake->FailAt(Call::kMemRelease, 2, Result::kUnknown);
  EXPECT_FALSE(world.Destroy({0, 2, 4}).ok());
  EXPECT_EQ(world.vmm->PhysicalBytes(), 4 * kBlock) << "the others went";
  EXPECT_OK(world.Create({0, 2, 4}));  // 2 is still there
  EXPECT_EQ(world.vmm->PhysicalBytes(), 6 * kBlock);
  EXPECT_OK(world.Map(0, {0, 2, 4}));
  EXPECT_OK(world.vmm->Fill(0, 3 * kBlock, 1));
}

TEST(FakeDriverVmmTest, AFailedRollbackIsMadeUpForLater) {
  // Access cannot be set, and then the second of three blocks cannot be unmapped.
  const auto fail = [](Mapped* world) {
    world->fake->FailAt(Call::kMemSetAccess, 1, Result::kOutOfMemory);
    world->fake->FailAt(Call::kMemUnmap, 2, Result::kUnknown);
    EXPECT_EQ(world->Map(20, {5, 0, 1}).code(), Code::kResourceExhausted);
    EXPECT_EQ(world->fake->faults(), 2);
  };
  {
    Mapped world;
    fail(&world);
    EXPECT_OK(world.Map(20, {3, 4, 5})) << "other blocks in the same place";
    EXPECT_OK(world.vmm->Fill(20 * kBlock, 3 * kBlock, 1));
  }
  {
    Mapped world;
    fail(&world);
    EXPECT_OK(world.Unmap(0, {0, 2, 4}));
    EXPECT_OK(world.Destroy({0})) << "its memory is given back, not only its handle";
    EXPECT_EQ(world.fake->Report().used_bytes, 5 * kBlock);
    EXPECT_EQ(world.fake->Report().mappings, 3);
  }
}

TEST(FakeDriverVmmTest, AnUnmapThatCannotBeUndoneSaysSo) {
  Mapped world;
  world.fake->FailAt(Call::kMemUnmap, 3, Result::kUnknown);
  world.fake->FailAt(Call::kMemMap, 1, Result::kUnknown);
  const Status status = world.Unmap(0, {0, 2, 4});
  EXPECT_TRUE(status.code() == Code::kInternal && Mentions(status, "close the pool")) << status.message();
}

TEST(FakeDriverVmmTest, WithoutADriverThereAreWords) {
  Driver driver;
  const Status absent = OpenDriverLibrary("libcuda_that_is_not_there.so.1", &driver);
  EXPECT_EQ(absent.code(), Code::kFailedPrecondition);
  EXPECT_TRUE(Mentions(absent, "libcuda_that_is_not_there.so.1") && Mentions(absent, "install NVIDIA's driver"))
      << absent.message();
  const Status other = OpenDriverLibrary("libm.so.6", &driver);
  EXPECT_TRUE(Mentions(other, "lacks cuInit") && driver.Init == nullptr) << other.message();
  const Driver* opened = nullptr;
  const Status real = Driver::Open(&opened);
  EXPECT_EQ(real.ok(), (opened != nullptr));
  EXPECT_TRUE(real.ok() || Mentions(real, "libcuda.so.1") || Mentions(real, "cuInit")) << real.message();
}

}  // namespace
}  // namespace kvpage
