// What CudaVmm counts on, asked of the driver of this machine; with --fake of the fake driver, which must give the same
// answers. benchmarks/run_gpu.sh runs it on machines with a GPU.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "testing/fake_driver.h"
#include "tests/check.h"
#include "vmm/cuda_vmm.h"

namespace kvpage {
namespace {

using cu::Result;

bool g_fake_wanted = false;

const Driver* OpenDriver() {
  if (!g_fake_wanted) {
    const Driver* driver = nullptr;
    CHECK_OK(Driver::Open(&driver));
    return driver;
  }
  static const std::unique_ptr<FakeDriver> fake = [] {
    std::unique_ptr<FakeDriver> made;
    CHECK_OK(FakeDriver::Make({}, &made));
    return made;
  }();
  return &fake->driver();
}

// The first device, its context current; `grain` is the granularity of its mappings.
struct World {
  World() : driver(*OpenDriver()) {
    DeviceDescription device;
    CHECK_OK(DescribeDevice(driver, 0, &device));
    CHECK(device.virtual_memory && device.granularity > 0);
    grain = static_cast<std::size_t>(device.granularity);
    CHECK_OK(CudaContext::Make(driver, 0, &context));
    scope = std::make_unique<ContextScope>(*context);
    CHECK_OK(scope->status());
  }
  // One byte of device memory.
  int Byte(const void* device) const {
    unsigned char byte = 0;
    const cu::DevicePtr from = reinterpret_cast<cu::DevicePtr>(device);
    CHECK(driver.MemcpyDtoHAsync(&byte, from, 1, nullptr) == Result::kSuccess);
    CHECK(driver.StreamSynchronize(nullptr) == Result::kSuccess);
    return byte;
  }
  const Driver& driver;
  std::size_t grain = 0;
  std::shared_ptr<CudaContext> context;
  std::unique_ptr<ContextScope> scope;
};

TEST(BlocksAreMappedAliasedMovedAndKeepWhatTheyHold) {
  World world;
  const std::int64_t block = static_cast<std::int64_t>(world.grain);
  for (const std::int64_t bytes : {block, 2 * block}) {
    std::unique_ptr<CudaVmm> vmm;
    CHECK_OK(CudaVmm::Make(world.context, 64 * bytes, bytes, &vmm));
    std::fprintf(stderr, "blocks of %lld bytes, %s\n", static_cast<long long>(bytes),
                 vmm->shareable() ? "shareable" : "not shareable");
    CHECK_OK(vmm->Grow(8));
    const std::int32_t blocks[] = {3, 0, 5, 3};
    CHECK_OK(vmm->Create(blocks, 3));
    CHECK_OK(vmm->Map(0, blocks, 4));
    for (int i = 0; i < 3; ++i) CHECK_OK(vmm->Fill(i * bytes, bytes, i + 1));
    CHECK_EQ(world.Byte(vmm->base() + 3 * bytes), 1) << "a block at two addresses";
    CHECK_EQ(world.Byte(vmm->base() + 3 * bytes - 1), 3);
    // Across blocks, in one go.
    CHECK_OK(vmm->Fill(bytes - 16, 32, 9));
    CHECK_EQ(world.Byte(vmm->base() + 3 * bytes + bytes - 1), 9);
    CHECK_EQ(world.Byte(vmm->base() + bytes + 15), 9);
    CHECK_OK(vmm->Move(bytes, 40 * bytes, blocks + 1, 2));
    CHECK_EQ(world.Byte(vmm->base() + 41 * bytes), 3);
    CHECK_OK(vmm->Map(bytes, blocks + 2, 1));
    CHECK_EQ(world.Byte(vmm->base() + bytes), 3) << "the place is free again";
    CHECK_OK(vmm->Unmap(bytes, blocks + 2, 1));
    CHECK_OK(vmm->Unmap(40 * bytes, blocks + 1, 2));
    CHECK_OK(vmm->Destroy(blocks + 1, 2));
    CHECK_EQ(vmm->PhysicalBytes(), bytes);
    // A far larger range than there is memory costs nothing. (Not a fixed number: the fake driver's addresses are those
    // of this process, of which ThreadSanitizer leaves as little as half a TiB in one piece.)
    std::size_t free = 0, total = 0;
    CHECK(world.driver.MemGetInfo(&free, &total) == Result::kSuccess);
    const std::int64_t far_more = 16 * static_cast<std::int64_t>(total) / bytes * bytes;
    std::unique_ptr<CudaVmm> large;
    CHECK_OK(CudaVmm::Make(world.context, far_more, bytes, &large));
  }
}

TEST(TheDriverKeepsTheRulesThatTheFakeOneChecks) {
  World world;
  const Driver& driver = world.driver;
  const std::size_t grain = world.grain;
  cu::AllocationProp prop;
  prop.location.id = world.context->device();
  cu::DevicePtr at = 0;
  CHECK(driver.MemAddressReserve(&at, 8 * grain, grain, 0, 0) == Result::kSuccess);
  CHECK_EQ(at % grain, std::size_t{0});
  cu::MemHandle one = 0, two = 0, odd = 0;
  CHECK(driver.MemCreate(&odd, grain + 4096, &prop, 0) != Result::kSuccess);
  CHECK(driver.MemCreate(&one, grain, &prop, 0) == Result::kSuccess);
  CHECK(driver.MemCreate(&two, 2 * grain, &prop, 0) == Result::kSuccess);
  CHECK(driver.MemMap(at, grain, 0, one, 0) == Result::kSuccess);
  CHECK(driver.MemMap(at, grain, 0, one, 0) != Result::kSuccess) << "over a mapping";
  CHECK(driver.MemMap(at + 4096, grain, 0, one, 0) != Result::kSuccess) << "off the grid";
  CHECK(driver.MemMap(at + grain, 2 * grain, 0, two, 0) == Result::kSuccess);
  CHECK(driver.MemUnmap(at + grain, grain) != Result::kSuccess) << "a part of a mapping";
  CHECK(driver.MemUnmap(at + 4 * grain, grain) != Result::kSuccess) << "a hole";
  cu::AccessDesc access;
  access.location.id = world.context->device();
  CHECK(driver.MemSetAccess(at, 4 * grain, &access, 1) != Result::kSuccess) << "into a hole";
  CHECK(driver.MemSetAccess(at, 3 * grain, &access, 1) == Result::kSuccess) << "two mappings at once";
  CHECK(driver.MemsetD8Async(at, 1, 3 * grain, nullptr) == Result::kSuccess);
  CHECK(driver.StreamSynchronize(nullptr) == Result::kSuccess);
  CHECK(driver.MemUnmap(at, grain) == Result::kSuccess);
  CHECK(driver.MemUnmap(at + grain, 2 * grain) == Result::kSuccess);
  CHECK(driver.MemRelease(one) == Result::kSuccess);
  CHECK(driver.MemRelease(two) == Result::kSuccess);
  CHECK(driver.MemAddressFree(at, 8 * grain) == Result::kSuccess);
}

TEST(WhatIsDestroyedIsFree) {
  World world;
  const std::int64_t bytes = static_cast<std::int64_t>(world.grain);
  std::unique_ptr<CudaVmm> vmm;
  CHECK_OK(CudaVmm::Make(world.context, 64 * bytes, bytes, &vmm));
  CHECK_OK(vmm->Grow(64));
  std::vector<std::int32_t> blocks;
  for (int i = 0; i < 64; ++i) blocks.push_back(i);
  std::size_t before = 0, during = 0, after = 0, total = 0;
  CHECK(world.driver.MemGetInfo(&before, &total) == Result::kSuccess);
  CHECK_OK(vmm->Create(blocks.data(), 64));
  CHECK_OK(vmm->Map(0, blocks.data(), 64));
  CHECK(world.driver.MemGetInfo(&during, &total) == Result::kSuccess);
  CHECK_OK(vmm->Unmap(0, blocks.data(), 64));
  CHECK_OK(vmm->Destroy(blocks.data(), 64));
  CHECK(world.driver.MemGetInfo(&after, &total) == Result::kSuccess);
  CHECK(during + 64 * world.grain <= before) << before << during;
  CHECK(after >= during + 64 * world.grain) << during << after;
}

TEST(RunningOutIsAStatus) {
  World world;
  const std::int64_t bytes = static_cast<std::int64_t>(world.grain);
  std::size_t free = 0, total = 0;
  CHECK(world.driver.MemGetInfo(&free, &total) == Result::kSuccess);
  // One handle of more than there is.
  const std::int64_t huge = static_cast<std::int64_t>(total / world.grain + 1) * bytes;
  std::unique_ptr<CudaVmm> vmm;
  CHECK_OK(CudaVmm::Make(world.context, huge, huge, &vmm));
  CHECK_OK(vmm->Grow(1));
  const std::int32_t block = 0;
  const Status status = vmm->Create(&block, 1);
  CHECK(status.code() == Code::kResourceExhausted) << status.message();
  std::fprintf(stderr, "%s\n", status.message().c_str());
  CHECK_EQ(vmm->PhysicalBytes(), 0);
}

}  // namespace
}  // namespace kvpage

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--fake") == 0) {
    kvpage::g_fake_wanted = true;
    --argc;
    ++argv;
  }
  if (!kvpage::g_fake_wanted) {
    const kvpage::Driver* driver = nullptr;
    if (const kvpage::Status status = kvpage::Driver::Open(&driver); !status.ok()) {
      std::fprintf(stderr, "%s\n(--fake asks the fake driver instead)\n", status.message().c_str());
      return 1;
    }
  }
  return kvpage::testing::RunAll(argc, argv);
}
