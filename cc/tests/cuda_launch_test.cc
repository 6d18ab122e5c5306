// Kernel launches on the emulated device: their shared memory, and how they overlap with other launches and graphs.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "testing/cuda_emulation/kernels.h"
#include "tests/cuda_attention_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

// A decode step on a cache, and its expected result.
struct Step {
  Problem problem;
  Cache cache;
  std::vector<int> slots;
  std::vector<double> out, lse;

  Step(Rng& rng, DType dtype, DType q_dtype, int head_dim)
      : problem(SomeProblem(rng, dtype, q_dtype, head_dim)),
        cache(RandomCache(rng, problem)),
        slots(StoreAnywhere(rng, problem, cache)) {
    Reference(problem, &out, &lse);
  }

  void Check(const Result& result) { CheckCuda(problem, result, out, lse, false); }

 private:
  static Problem SomeProblem(Rng& rng, DType dtype, DType q_dtype, int head_dim) {
    Problem p;
    p.kv_heads = 1;
    p.group = 2;
    p.head_dim = head_dim;
    p.dtype = dtype;
    p.q_dtype = q_dtype;
    FillProblem(rng, p, {{70, 1}, {0, 1}}, 0);
    return p;
  }
};

CudaRun Unaligned() {
  CudaRun run;
  run.aligned = false;
  return run;
}

__global__ void CountsAfterItsWaitKernel(int* count) {
  KVPAGE_SHARED(int, step);
  if (threadIdx.x == 0) step = 1;
  __syncthreads();
  cuda::WaitForPriorKernel();
  atomicAdd(count, step);
}
// A separate kernel, because the architecture of the loaded code is determined once per kernel.
__global__ void CountsInOldCodeKernel(int* count) {
  cuda::WaitForPriorKernel();
  atomicAdd(count, 1);
}
__global__ void ReadsBeforeItsWaitKernel(int* count) {
  const int before = *count;
  cuda::WaitForPriorKernel();
  *count = before + 1;
}
__global__ void CopiesBeforeItsWaitKernel(const int* from, int* to) {
  KVPAGE_SHARED(int[4], tile);
  emulation::CopyAsync(tile, from, 16, 16);
  cuda::WaitForPriorKernel();
  emulation::CommitCopies();
  emulation::WaitForCopies(0);
  to[0] = tile[0];
}

TEST(CudaLaunchTest, OverlappedKernelsTouchNothingBeforeTheyWait) {
  const cuda::LaunchShape shape = {3, 64, 0, /*overlap=*/true};
  std::vector<int> numbers(4);
  EXPECT_OK(cuda::Launch<CountsAfterItsWaitKernel>("counts", shape, nullptr, numbers.data()));
  EXPECT_EQ(numbers[0], 3 * 64);
  EXPECT_DEATH(static_cast<void>(cuda::Launch<ReadsBeforeItsWaitKernel>("reads", shape, nullptr, numbers.data())),
               "accesses global memory before it waits");
  EXPECT_DEATH(static_cast<void>(
                   cuda::Launch<CopiesBeforeItsWaitKernel>("copies", shape, nullptr, numbers.data(), numbers.data())),
               "copies global memory before it waits");
}

// Code compiled for an older architecture cannot wait for its predecessor, so such kernels run one after the other.
TEST(CudaLaunchTest, OldCodeDoesNotOverlap) {
  const ScopedDevice device(4, 0);
  emulation::device().major = 12;
  emulation::device().code_version = 80;
  const cuda::LaunchShape shape = {3, 64, 0, /*overlap=*/true};
  int count = 0;
  EXPECT_OK(cuda::Launch<CountsInOldCodeKernel>("counts", shape, nullptr, &count));
  EXPECT_EQ(count, 3 * 64);
}

// Some sizes use all of the default 48 KiB of shared memory, which static shared memory counts toward.
TEST(CudaLaunchTest, EveryHeadSizeAroundTheDefaultLimit) {
  Rng rng(11);
  for (int head_dim = 38; head_dim <= 50; ++head_dim) {
    Step step(rng, DType::kBF16, DType::kBF16, head_dim);
    step.Check(RunCuda(step.problem, step.cache, step.slots, Unaligned()));
  }
  for (const DType dtype : {DType::kI8, DType::kF8E4M3}) {
    for (int head_dim = 78; head_dim <= 98; ++head_dim) {
      Step step(rng, dtype, DType::kBF16, head_dim);
      step.Check(RunCuda(step.problem, step.cache, step.slots, Unaligned()));
    }
  }
}

// Some of these sizes use the last kilobyte of shared memory that static variables leave.
TEST(CudaLaunchTest, LargeHeadsTakeAllSharedMemory) {
  Rng rng(12);
  for (const int head_dim : {388, 500, 512, 588, 592, 596, 600, 708, 788, 1018, 1056, 1100}) {
    Step step(rng, DType::kF32, DType::kF32, head_dim);
    const CudaBatch batch(step.problem, step.cache, step.slots, Unaligned());
    // Either there is enough, or an error says so before anything is launched.
    const Status status = batch.Launch();
    if (status.ok()) {
      step.Check(batch.result());
    } else {
      EXPECT_NE(status.message().find("use a smaller head_dim"), std::string::npos) << status.message();
    }
  }
}

// Swizzled tiles have their rows in different banks.
TEST(CudaLaunchTest, TensorCoreKernelsHaveRoomAndNoBankConflicts) {
  Rng rng(15);
  const std::int64_t before = emulation::NumBankConflicts();
  for (const int head_dim : {64, 128, 256}) {
    Problem p;
    p.kv_heads = 1;
    p.group = 2;
    p.head_dim = head_dim;
    p.dtype = p.q_dtype = DType::kBF16;
    FillProblem(rng, p, {{70, 1}, {5, 40}}, 0);  // decode and prefill
    const Cache cache = RandomCache(rng, p);
    const std::vector<int> slots = StoreAnywhere(rng, p, cache);
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    CheckCuda(p, RunCuda(p, cache, slots), out, lse, true);
  }
  EXPECT_EQ(emulation::NumBankConflicts(), before);
}

// The shared memory of a captured launch must still be allowed when its graph is instantiated, after other launches.
TEST(CudaLaunchTest, AGraphKeepsItsSharedMemory) {
  Rng rng(13);
  Step large(rng, DType::kF32, DType::kF32, 264), small(rng, DType::kF32, DType::kF32, 128);
  static_cast<void>(RunCuda(large.problem, large.cache, large.slots, Unaligned()));  // loads the kernels
  const CudaBatch captured(large.problem, large.cache, large.slots, Unaligned());
  emulation::Graph graph;
  graph.Begin();
  EXPECT_OK(captured.Launch());
  graph.End();
  EXPECT_EQ(graph.size(), 2u);
  small.Check(RunCuda(small.problem, small.cache, small.slots, Unaligned()));
  ASSERT_EQ(graph.Instantiate(), cudaSuccess);
  graph.Launch();
  large.Check(captured.result());
}

TEST(CudaLaunchTest, ThreadsLaunchOneKernelWithDifferentSizes) {
  Rng rng(14);
  std::vector<std::unique_ptr<Step>> steps;
  for (const int head_dim : {128, 192, 264, 320}) {
    steps.push_back(std::make_unique<Step>(rng, DType::kF32, DType::kF32, head_dim));
  }
  std::vector<std::thread> threads;
  for (const auto& step : steps) {
    threads.emplace_back([&step] {
      for (int round = 0; round < 10; ++round) {
        const CudaBatch batch(step->problem, step->cache, step->slots, Unaligned());
        EXPECT_OK(batch.Launch());
        step->Check(batch.result());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace kvpage::testing
