// The CPU kernels with every instruction set that this machine has, against a reference in double precision.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/expect_ok.h"
#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

// Whether prefill multiplies in bfloat16 (and decode, float8 values).
bool TakesPairs(const Problem& p) {
  return p.q_dtype == DType::kBF16 && std::string(cpu::InstructionSet()) == "avx512_bf16" &&
         (p.dtype == DType::kBF16 || (IsQuantized(p.dtype) && !p.exact_weights));
}

// Compares with the reference, allowing for the rounding of the output dtype, of float32 sums and of the weights:
// weights that are off by factors 1 + e, normalized by their own sum, move an output by at most the largest |e| times
// its spread. (Weights of quantized values are normalized by the sum before rounding.) With exact weights, bytes hold
// the rounding remainder, in units of 1/32512 of the largest value times its weight.
void CheckResult(Problem& p, const Result& result, const std::vector<double>& out, const std::vector<double>& lse) {
  const double unit = p.q_dtype == DType::kF32 ? 0.0 : (p.q_dtype == DType::kBF16 ? 1.0 / 256 : 1.0 / 2048);
  const double weights = TakesPairs(p) && !p.exact_weights ? 1.02 / 256 : 0.0;
  const double limit = TakesPairs(p) && p.exact_weights ? 2e-4 : 4e-6;
  double worst = 0, worst_lse = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double got = Read(&result.out[i * ItemSize(p.q_dtype)], p.q_dtype);
    const double error = std::fabs(got - out[i]) - unit * std::fabs(out[i]) - weights * p.spread[i];
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
  }
  for (std::size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(lse[i]) && std::isinf(result.lse[i])) continue;
    const double error = std::fabs(result.lse[i] - lse[i]) / (1.0 + std::fabs(lse[i]));
    worst_lse = std::isnan(error) ? 1e9 : std::max(worst_lse, error);
  }
  EXPECT_LT(worst, limit) << worst << " " << Describe(p);
  EXPECT_LT(worst_lse, 2e-6) << worst_lse << " " << Describe(p);
}

Problem RandomProblem(Rng& rng) {
  Problem p;
  p.kv_heads = Pick(rng, 1, 3);
  p.group = PickOf(rng, {1, 2, 3, 4, 4, 7, 8, 16});
  p.head_dim = PickOf(rng, {1, 5, 16, 32, 33, 64, 64, 80, 96, 100, 128, 128, 256, 264});
  p.dtype = kStored[Pick(rng, 0, 4)];
  p.q_dtype = kDTypes[Pick(rng, 0, 2)];
  if (Pick(rng, 0, 2) == 0) p.window = PickOf(rng, {1, 2, 17, 64, 100, 513});
  if (Pick(rng, 0, 2) == 0) p.soft_cap = PickOf(rng, {0.7f, 5.0f, 50.0f});
  std::uniform_real_distribution<float> uniform(-2.0f, 4.0f);
  for (int h = 0, sinks = Pick(rng, 0, 2); sinks == 0 && h < p.q_heads(); ++h) p.sinks.push_back(uniform(rng));
  for (int h = 0, alibi = Pick(rng, 0, 2); alibi == 0 && h < p.q_heads(); ++h) p.slopes.push_back(uniform(rng) * 0.05f);
  std::vector<std::pair<int, int>> lengths;
  for (int s = Pick(rng, 1, 4); s > 0; --s) {
    const int before = PickOf(rng, {0, Pick(rng, 1, 63), Pick(rng, 64, 600), Pick(rng, 500, 1300)});
    const int added = PickOf(rng, {1, 1, 1, 2, Pick(rng, 3, 12)});
    lengths.emplace_back(before, added);
  }
  if (Pick(rng, 0, 2) == 0) lengths.emplace_back(Pick(rng, 0, 90), Pick(rng, 20, 150));  // a prefill
  FillProblem(rng, p, lengths, Pick(rng, 0, 2));
  return p;
}

TEST(KernelsTest, RandomBatchesMatchReference) {
  Rng rng(1);
  Inline here;
  Threads threads(3);
  for (int round = 0; round < 80; ++round) {
    Problem p = RandomProblem(rng);
    p.exact_weights = round % 3 == 0;
    const Cache cache = RandomCache(rng, p, /*apart=*/true);
    const std::vector<int> slots = StoreAnywhere(rng, p, cache);
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result result = RunAttention(p, cache, slots, here);
      CheckResult(p, result, out, lse);
      EXPECT_EQ(RunAttention(p, cache, slots, threads), result) << "with threads " << Describe(p);
    }
  }
}

// Decode and prefill in the common shapes, every combination of dtypes.
TEST(KernelsTest, EveryDtypeMatchesReference) {
  Rng rng(2);
  Inline here;
  for (const DType dtype : kStored) {
    for (const DType q_dtype : kDTypes) {
      for (const int head_dim : {64, 80}) {
        Problem p;
        p.kv_heads = 2;
        p.group = 4;
        p.head_dim = head_dim;
        p.dtype = dtype;
        p.q_dtype = q_dtype;
        FillProblem(rng, p, {{700, 1}, {0, 70}, {90, 3}, {0, 1}}, 1);
        const Cache cache(rng, Layout::kFused, dtype, 2, head_dim, 4, p.max_tokens(), 16);
        Store(p, cache, Slots(4));
        std::vector<double> out, lse;
        Reference(p, &out, &lse);
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          CheckResult(p, RunAttention(p, cache, Slots(4), here), out, lse);
        }
      }
    }
  }
}

// A context that ends where mapped memory ends, also for head sizes that are not a multiple of the vector size.
TEST(KernelsTest, NothingPastTheEndIsTouched) {
  Rng rng(5);
  Inline here;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const DType dtype : kStored) {
    for (const int head_dim : {1, 7, 33, 64, 80, 100}) {
      for (const int added : {1, 30}) {
        Problem p;
        p.kv_heads = 2;
        p.group = 3;
        p.head_dim = head_dim;
        p.dtype = dtype;
        p.q_dtype = IsQuantized(dtype) ? DType::kF16 : dtype;
        FillProblem(rng, p, {{Pick(rng, 0, 130), added}}, 0);
        Cache cache(rng, Layout::kPerLayer, dtype, 2, head_dim, 1, p.tokens(0), p.tokens(0));
        const auto bytes = static_cast<std::size_t>(cache.view.chunk_stride);
        const std::size_t mapped = (bytes + page - 1) / page * page;
        char* memory[2];
        for (char*& m : memory) {
          m = static_cast<char*>(
              mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
          mprotect(m + mapped, page, PROT_NONE);
        }
        cache.layer = 0;
        cache.view.base = memory[0] + mapped - bytes;
        cache.view.kv_stride = memory[1] - memory[0];
        Store(p, cache, {0});
        std::vector<double> out, lse;
        Reference(p, &out, &lse);
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          CheckResult(p, RunAttention(p, cache, {0}, here), out, lse);
        }
        for (char* m : memory) munmap(m, mapped + page);
      }
    }
  }
}

TEST(KernelsTest, ScoresOfAnySizeAreFinite) {
  Rng rng(6);
  Inline here;
  for (const float scale : {0.0f, 30.0f}) {
    Problem p;
    p.group = 4;
    FillProblem(rng, p, {{600, 1}, {0, 30}}, 0);
    p.scale = scale;
    const Cache cache(rng, Layout::kFused, DType::kF32, 1, 64, 2, p.max_tokens(), 16);
    Store(p, cache, Slots(2));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result result = RunAttention(p, cache, Slots(2), here);
      for (std::size_t i = 0; i < out.size(); ++i) {
        EXPECT_LT(std::fabs(Read(&result.out[i * 4], DType::kF32) - out[i]), 2e-3) << scale << " " << Describe(p);
      }
    }
  }
}

TEST(KernelsTest, MinusInfinityScoresAreLeftOut) {
  Rng rng(7);
  Inline here;
  for (const int added : {1, 20}) {
    Problem p;
    p.group = 2;
    FillProblem(rng, p, {{1100, added}}, 0);
    for (std::size_t i = 0; i < p.q.size(); i += 4) Write(&p.q[i], DType::kF32, 1.0f);
    // The entire first span scores -inf; a very low score makes the reference skip it.
    for (int t = 0; t < 512; ++t) p.At(0, 0, t, 0, 5) = -1e30f;
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    for (int t = 0; t < 512; ++t) p.At(0, 0, t, 0, 5) = -std::numeric_limits<float>::infinity();
    const Cache cache(rng, Layout::kFused, DType::kF32, 1, 64, 1, p.max_tokens(), 16);
    Store(p, cache, {0});
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      CheckResult(p, RunAttention(p, cache, {0}, here), out, lse);
    }
  }
}

TEST(KernelsTest, ConcurrentCallsDoNotMix) {
  Rng rng(8);
  Problem p;
  p.kv_heads = 2;
  p.group = 4;
  FillProblem(rng, p, {{1500, 1}, {40, 20}}, 0);
  const Cache cache(rng, Layout::kFused, DType::kF32, 2, 64, 2, p.max_tokens(), 16);
  Store(p, cache, Slots(2));
  InstructionSets();
  Inline here;
  const Result expected = RunAttention(p, cache, Slots(2), here);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      Threads threads(2);
      for (int k = 0; k < 10; ++k) wrong += !(RunAttention(p, cache, Slots(2), threads) == expected);
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(KernelsTest, PaddingTokensAreCleared) {
  Rng rng(11);
  Inline here;
  Problem p;
  FillProblem(rng, p, {{3, 1}, {3, 2}}, 2);
  const Cache cache(rng, Layout::kFused, DType::kF32, 1, 64, 2, 16, 16);
  Store(p, cache, Slots(2));
  const Result result = RunAttention(p, cache, Slots(2), here, 1);
  for (int t = 0; t < p.num_tokens; ++t) {
    const bool owned = t >= p.sequences[1].query_begin && t < p.sequences[1].query_begin + 2;
    EXPECT_EQ(std::isinf(result.lse[t]), !owned) << "token " << t;
    EXPECT_EQ(Read(&result.out[t * 64 * 4], DType::kF32) == 0.0, !owned) << "token " << t;
  }
  Problem none;
  none.num_tokens = 2;
  none.q.resize(2 * 64 * 4);
  const Result empty = RunAttention(none, cache, {}, here);
  EXPECT_TRUE(std::all_of(empty.out.begin(), empty.out.end(), [](char c) { return c == 0; }));
}

TEST(KernelsTest, InstructionSetIsKnown) {
  EXPECT_OK(cpu::CheckInstructionSet());
  EXPECT_EQ(cpu::ForceInstructionSet("sse9"), nullptr);
  cpu::ForceInstructionSet("baseline");
  EXPECT_EQ(std::string(cpu::InstructionSet()), std::string("baseline"));
}

}  // namespace
}  // namespace kvpage::testing
