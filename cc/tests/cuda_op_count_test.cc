// The count of running ops in a pool's entry (kernels/cuda/readers.cuh): an op counts from its check to the end of its
// last kernel, even if a launch fails; and how the host uses the count.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/cuda/check.cuh"
#include "testing/cuda_emulation/emulator.h"
#include "tests/cuda_util.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kTokens = 3;

// A pool on the fake driver with one occupied slot, and the operands of an append there.
struct World {
  Machine machine;
  std::shared_ptr<Pool> pool = machine.MakePool(300, 16);
  std::int32_t handle[2] = {300, 0};
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;
  std::int32_t slot = -1, layer = 0;
  const std::int32_t offsets[2] = {0, kTokens};
  const std::vector<float> values = std::vector<float>(kTokens * 16, 2.5f);
  std::unique_ptr<char[]> scratch = Scratch(1, kSlots);
  cuda::BatchOperands batch = {&slot, offsets, 1, kTokens};
  cuda::AppendOperands append = {&layer, values.data(), values.data(), DType::kF32, 1, 16};

  World() {
    Use(NewGeneration());
    slot = pool->Acquire({kTokens}).slots[0];
    const SlotEdit edit = {static_cast<std::int32_t>(SlotOpcode::kOccupy), slot, 0};
    EXPECT_OK(cuda::EditSlots(Cache(DeviceOp::kAcquire), handle, {&edit, 1, nullptr, 0}, &epoch, lengths.data(),
                              nullptr, nullptr));
    EXPECT_EQ(readers(), 0u);
  }
  Pool::Generation NewGeneration() {
    Pool::Generation generation;
    EXPECT_OK(pool->NewGeneration(&generation));
    return generation;
  }
  void Use(const Pool::Generation& generation) {
    handle[1] = generation.generation;
    epoch = generation.epoch;
    lengths = generation.lengths;
  }
  cuda::CacheOperands Cache(DeviceOp op) {
    return {op, machine.device()->table(), handle, &epoch, lengths.data(), pool->geometry().spec()};
  }
  std::uint32_t readers() { return machine.Find(300)->readers; }
  // Launches the kernels of append_kv one by one.
  Status Check() {
    const auto args = cuda::ToArgs(Cache(DeviceOp::kAppendKV), batch, &layer, nullptr, true, &epoch, scratch.get(),
                                   /*followers=*/kTokens);
    return cuda::LaunchBatchCheck(Cache(DeviceOp::kAppendKV), args, nullptr);
  }
  Status Append(bool last) {
    return cuda::LaunchAppend(reinterpret_cast<CheckedBatch*>(scratch.get()), kTokens, append, DType::kF32, last,
                              nullptr);
  }
};

TEST(CudaOpCountTest, AnOpIsCountedFromItsCheckToTheEndOfItsLastKernel) {
  World world;
  EXPECT_OK(world.Check());
  EXPECT_EQ(world.readers(), std::uint32_t{kTokens});
  EXPECT_OK(world.Append(/*last=*/false));
  EXPECT_EQ(world.readers(), std::uint32_t{kTokens});
  EXPECT_OK(world.Append(/*last=*/true));
  EXPECT_EQ(world.readers(), 0u);
  const std::int64_t before = emulation::NumLaunches();
  EXPECT_OK(cuda::AppendKV(world.Cache(DeviceOp::kAppendKV), world.batch, world.append, &world.epoch,
                           world.scratch.get(), nullptr));
  EXPECT_EQ(emulation::NumLaunches(), before + 2) << "the check and the append, nothing to count";
  EXPECT_EQ(world.readers(), 0u);
}

TEST(CudaOpCountTest, RefusedOpsAreCountedOutByTheirCheck) {
  World world;
  world.handle[1] += 1;
  EXPECT_OK(world.Check());
  EXPECT_EQ(world.readers(), 0u);
  EXPECT_OK(world.Append(/*last=*/true));
  EXPECT_EQ(world.readers(), 0u);
  world.handle[0] = 300 + kMaxDevicePools;  // its search starts at this pool's entry
  EXPECT_OK(world.Check());
  EXPECT_EQ(world.readers(), 0u);
  EXPECT_TRUE(Mentions(world.pool->TakeFault(), "belongs to generation"));
  EXPECT_TRUE(Mentions(world.pool->TakeFault(), "there is no pool 556"));
}

TEST(CudaOpCountTest, AnOpWhoseLaunchFailedIsCountedOut) {
  World world;
  EXPECT_OK(world.Check());
  EXPECT_TRUE(
      Mentions(cuda::CountOutUnless(Internal("no launch"), world.scratch.get(), kTokens, nullptr), "no launch"));
  EXPECT_EQ(world.readers(), 0u);
  world.handle[1] += 1;  // a refused op must not be counted out
  EXPECT_OK(world.Check());
  EXPECT_FALSE(cuda::CountOutUnless(Internal("no launch"), world.scratch.get(), kTokens, nullptr).ok());
  EXPECT_EQ(world.readers(), 0u);
  world.handle[1] -= 1;
  EXPECT_TRUE(Mentions(world.pool->TakeFault(), "belongs to generation"));
  // No block has enough shared memory for this head, which is detected after the check was launched.
  cuda::AttentionOperands attention;
  attention.layer = &world.layer;
  attention.num_q_heads = attention.num_kv_heads = 1;
  attention.head_dim = 1 << 16;
  attention.max_context = 16;
  attention.max_slots = kSlots;
  const auto plan = Exactly<char>(cuda::PlanBytes(1));
  const auto scratch = Exactly<char>(cuda::AttentionBytes(attention, 1, kTokens));
  const Status status = cuda::Attend(world.Cache(DeviceOp::kUpdateAndAttend), world.batch, attention, &world.append,
                                     plan.get(), &world.epoch, scratch.get(), nullptr);
  EXPECT_TRUE(Mentions(status, "shared memory")) << status.message();
  EXPECT_EQ(world.readers(), 0u);
}

TEST(CudaOpCountTest, AGenerationWaitsForTheKernelsThatPassed) {
  World world;
  world.machine.device()->set_wait_limit(std::chrono::milliseconds{1});
  EXPECT_OK(world.Check());
  Pool::Generation generation;
  EXPECT_TRUE(Mentions(world.pool->NewGeneration(&generation), "still use the pool"));
  EXPECT_OK(world.Append(/*last=*/true));
  world.Use(world.NewGeneration());
  EXPECT_EQ(world.machine.Find(300)->written[world.slot * kLayers], 0);
  EXPECT_OK(world.Check());
  EXPECT_OK(world.Append(/*last=*/true));
  EXPECT_OK(world.pool->TakeFault());
}

}  // namespace
}  // namespace kvpage::testing
