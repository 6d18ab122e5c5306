// The emulated device itself: kernels compute what a GPU would, and mistakes end with a message.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/elements.cuh"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

using cuda::Launch;
using cuda::LaunchShape;

// Block-wise sums of numbers: shuffles, static and dynamic shared memory, a barrier, an atomic.
__global__ void __launch_bounds__(128) SumKernel(const int* in, int* out, int n) {
  KVPAGE_SHARED(int[4], sums);
  KVPAGE_DYNAMIC_SHARED(raw);
  auto* const copy = reinterpret_cast<int*>(raw);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  copy[threadIdx.x] = i < n ? in[i] : 0;
  __syncthreads();
  int sum = copy[blockDim.x - 1 - threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(cuda::kFullMask, sum, step);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, sums[0] + sums[1] + sums[2] + sums[3]);
}

TEST(CudaEmulationTest, BlocksAndWarpsComputeTogether) {
  std::vector<int> in(1000);
  std::iota(in.begin(), in.end(), 1);
  for (const std::uint64_t seed : {0, 1, 2}) {
    emulation::device().seed = seed;
    int out = 0;
    EXPECT_OK(Launch<SumKernel>("sum", LaunchShape{8, 128, 128 * sizeof(int)}, nullptr, in.data(), &out, 1000));
    EXPECT_EQ(out, 500500);
  }
  emulation::device().seed = 0;
}

__global__ void CollectiveKernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  if (lane % 2 == 0) {  // half of the lanes on their own
    out[threadIdx.x] = __reduce_add_sync(0x55555555u, lane);
  } else {
    out[threadIdx.x] = __ballot_sync(0xaaaaaaaau, lane > 16);
  }
  __syncwarp();
  out[64 + threadIdx.x] =
      __shfl_up_sync(cuda::kFullMask, lane, 3) + 100 * __shfl_down_sync(cuda::kFullMask, lane, 1, 8);
  out[128 + threadIdx.x] = static_cast<unsigned>(__syncthreads_count(threadIdx.x < 5));
}

TEST(CudaEmulationTest, CollectivesOfSomeLanes) {
  std::vector<unsigned> out(192);
  EXPECT_OK(Launch<CollectiveKernel>("collective", LaunchShape{1, 64}, nullptr, out.data()));
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned lane = i % 32;
    EXPECT_EQ(out[i], lane % 2 == 0 ? 240u : 0xaaaa0000u & 0xfffe0000u);
    EXPECT_EQ(out[64 + i], (lane < 3 ? lane : lane - 3) + 100 * (lane % 8 == 7 ? lane : lane + 1));
    EXPECT_EQ(out[128 + i], 5u);
  }
}

__global__ void PollKernel(int* out) {
  KVPAGE_SHARED(volatile int, flag);
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 40) flag = 7;
  while (flag == 0) __nanosleep(20);
  out[threadIdx.x] = flag;
}

__global__ void CopyKernel(const int* in, int* out) {
  KVPAGE_SHARED(int[8], tile);
  emulation::CopyAsync(&tile[0], in, 16, 16);
  emulation::CommitCopies();
  emulation::CopyAsync(&tile[4], in + 4, 16, 8);
  emulation::CommitCopies();
  emulation::WaitForCopies(1);
  for (int i = 0; i < 8; ++i) out[i] = tile[i];
  emulation::WaitForCopies(0);
  for (int i = 0; i < 8; ++i) out[8 + i] = tile[i];
}

TEST(CudaEmulationTest, PollingAndAsynchronousCopies) {
  std::vector<int> out(64), in = {1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_OK(Launch<PollKernel>("poll", LaunchShape{1, 64}, nullptr, out.data()));
  for (const int x : out) EXPECT_EQ(x, 7);
  EXPECT_OK(Launch<CopyKernel>("copy", LaunchShape{1, 1}, nullptr, in.data(), out.data()));
  const int expected[] = {1, 2, 3, 4, -1, -1, -1, -1, 1, 2, 3, 4, 5, 6, 0, 0};
  for (int i = 0; i < 16; ++i) EXPECT_EQ(out[i], expected[i]);
}

TEST(CudaEmulationTest, BankConflictsAreCounted) {
  alignas(128) static unsigned char tile[8][128];
  const auto conflicts = [](int stride) {
    const void* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = &tile[0][0] + i * stride;
    const std::int64_t before = emulation::NumBankConflicts();
    emulation::CountBankConflicts(rows, 8);
    return emulation::NumBankConflicts() - before;
  };
  EXPECT_EQ(conflicts(0), 0);    // all read the same row
  EXPECT_EQ(conflicts(16), 0);   // adjacent rows
  EXPECT_EQ(conflicts(32), 1);   // pairs conflict
  EXPECT_EQ(conflicts(112), 0);  // an odd number of rows apart
  EXPECT_EQ(conflicts(128), 7);
}

// ---- mistakes ----
__global__ void ReturnsKernel() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void TwoPlacesKernel() {
  if (threadIdx.x < 32) {  // NOLINT(bugprone-branch-clone): two places are the point
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void MaskKernel() {
  if (threadIdx.x < 16) static_cast<void>(__shfl_sync(threadIdx.x < 8 ? 0xffffu : 0xffffffffu, 1, 0));
}
__global__ void AbsentKernel() {
  if (threadIdx.x < 16) __syncwarp();
}
__global__ void SpinKernel() {
  while (true) __nanosleep(10);
}
// Neither kernel below polls: the first always reaches another barrier, the second waits without saying so.
__global__ void BarriersKernel() {
  while (true) __syncthreads();
}
__global__ void ComputesKernel() {
  KVPAGE_SHARED(volatile int, flag);
  flag = 1;
  while (flag != 0) {
  }
}
__global__ void StaticSharedKernel() {
  KVPAGE_SHARED(char[900], first);
  KVPAGE_SHARED(char[900], second);
  first[threadIdx.x] = second[threadIdx.x] = 0;
}
// Reads a neighbour's number without a barrier in between.
__global__ void RaceKernel(int* out) {
  KVPAGE_SHARED(int[64], numbers);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// Runs the kernel in a child process and returns its output if it aborted.
template <auto kKernel>
std::string MessageOf() {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    static_cast<void>(Launch<kKernel>("wrong", LaunchShape{1, 64}, nullptr));
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[512];
  for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;) text.append(part, static_cast<std::size_t>(n));
  close(ends[0]);
  int state = 0;
  waitpid(child, &state, 0);
  return WIFEXITED(state) && WEXITSTATUS(state) == 0 ? "ended well" : text;
}

bool Has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

TEST(CudaEmulationTest, MistakesEndInAMessage) {
  const std::string returns = MessageOf<ReturnsKernel>();
  EXPECT_TRUE(Has(returns, "wait for each other") && Has(returns, "returned: threads 3") &&
              Has(returns, "__syncthreads"))
      << returns;
  const std::string places = MessageOf<TwoPlacesKernel>();
  EXPECT_TRUE(Has(places, "wait for each other") && Has(places, "cuda_emulation_test.cc:")) << places;
  EXPECT_TRUE(Has(MessageOf<MaskKernel>(), "wait for each other")) << MessageOf<MaskKernel>();
  EXPECT_TRUE(Has(MessageOf<AbsentKernel>(), "__syncwarp")) << MessageOf<AbsentKernel>();
  EXPECT_TRUE(Has(MessageOf<StaticSharedKernel>(), "static shared memory")) << MessageOf<StaticSharedKernel>();
  EXPECT_TRUE(Has(MessageOf<SpinKernel>(), "polls in __nanosleep")) << MessageOf<SpinKernel>();
}

TEST(CudaEmulationTest, KernelsThatDoNotEndFail) {
  emulation::device().launch_seconds = 0.2;
  const std::string barriers = MessageOf<BarriersKernel>();
  const std::string computes = MessageOf<ComputesKernel>();
  emulation::device().launch_seconds = emulation::Device().launch_seconds;
  // The message lists the threads that wait at that moment, which may be just one.
  EXPECT_TRUE(Has(barriers, "does not end") && Has(barriers, "__syncthreads") && Has(barriers, "thread")) << barriers;
  EXPECT_TRUE(Has(computes, "thread 0: the kernel does not end") && Has(computes, "does not wait")) << computes;
}

TEST(CudaEmulationTest, MissingBarriersShow) {
  std::vector<int> out(64);
  EXPECT_OK(Launch<RaceKernel>("race", LaunchShape{1, 64}, nullptr, out.data()));
  EXPECT_EQ(out[0], -1);  // shared memory was poisoned
}

TEST(CudaEmulationTest, LaunchesAreChecked) {
  Status status = Launch<SumKernel>("sum", LaunchShape{0, 128}, nullptr, nullptr, nullptr, 0);
  EXPECT_TRUE(!status.ok() && Has(status.message(), "kernel sum (0 x 1 x 1 blocks")) << status.message();
  status = Launch<SumKernel>("sum", LaunchShape{1, 128, 300 << 10}, nullptr, nullptr, nullptr, 0);
  EXPECT_TRUE(!status.ok() && Has(status.message(), "307200 bytes of shared memory")) << status.message();
}

// ---- elements ----
TEST(CudaEmulationTest, SixteenBitFloats) {
  std::mt19937 random(5);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<unsigned short>(i);
    const float half = __half2float(__ushort_as_half(bits)), brain = __bfloat162float(__ushort_as_bfloat16(bits));
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent < 31) {
      const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
      EXPECT_EQ(static_cast<double>(half), bits >= 0x8000 ? -size : size);
      EXPECT_EQ(__half_as_ushort(__float2half_rn(half)), bits);
    }
    EXPECT_TRUE(brain != brain || __bfloat16_as_ushort(__float2bfloat16_rn(brain)) == bits);
    // The nearest of the two neighbours, and the even one in a tie.
    if (exponent >= 30 || bits >= 0x7fff) continue;
    const float next = __half2float(__ushort_as_half(static_cast<unsigned short>(bits + 1)));
    const float middle = (half + next) / 2;
    EXPECT_EQ(__half_as_ushort(__float2half_rn(middle)), (bits & 1) == 0 ? bits : bits + 1);
    EXPECT_EQ(__half_as_ushort(__float2half_rn(std::nextafter(middle, half))), bits);
    EXPECT_EQ(__half_as_ushort(__float2half_rn(std::nextafter(middle, next))), bits + 1);
  }
  EXPECT_EQ(__half_as_ushort(__float2half_rn(65519.9f)), 0x7bff);
  EXPECT_EQ(__half_as_ushort(__float2half_rn(65520.0f)), 0x7c00);
  EXPECT_TRUE(std::isnan(__half2float(__float2half_rn(std::nanf("")))));
  EXPECT_TRUE(std::isnan(__bfloat162float(__float2bfloat16_rn(std::nanf("")))));
}

TEST(CudaEmulationTest, EightBitFloats) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 127) == 127) continue;
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(mantissa + 8, exponent - 10);
    EXPECT_EQ(static_cast<double>(cuda::ToFloat(cuda::Float8{static_cast<std::uint8_t>(code)})),
              code >= 128 ? -size : size);
  }
}

}  // namespace
}  // namespace kvpage::testing
