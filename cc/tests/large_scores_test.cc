// The CPU kernels with scores up to the largest float32, and beyond, on every instruction set.
#include "tests/large_scores.h"

#include <gtest/gtest.h>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

// Decode and prefill, with one span and several.
const std::vector<std::pair<int, int>> kLengths = {{1300, 1}, {700, 6}, {0, 90}, {64, 2}, {0, 1}};

void CheckLarge(Problem& p, const Result& result, const std::vector<double>& out, const std::vector<double>& lse,
                float size) {
  const double unit = p.q_dtype == DType::kF32 ? 0.0 : (p.q_dtype == DType::kBF16 ? 1.0 / 256 : 1.0 / 2048);
  double worst = 0, worst_lse = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double got = Read(&result.out[i * ItemSize(p.q_dtype)], p.q_dtype);
    const double error = std::fabs(got - out[i]) - unit * std::fabs(out[i]);
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
  }
  for (std::size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(lse[i]) && lse[i] == result.lse[i]) continue;
    const double error = std::fabs(result.lse[i] - lse[i]) / (1.0 + std::fabs(lse[i]));
    worst_lse = std::isnan(error) ? 1e9 : std::max(worst_lse, error);
  }
  // Where pairs are multiplied, quantized values are weighted by bfloat16 times their scale.
  EXPECT_LT(worst, IsQuantized(p.dtype) && p.q_dtype == DType::kBF16 ? 2e-2 : 2e-4)
      << worst << " size " << size << " " << Describe(p);
  EXPECT_LT(worst_lse, 2e-6) << worst_lse << " size " << size << " " << Describe(p);
}

void CheckOnEverySet(Rng& rng, Problem& p, float size) {
  Inline here;
  const Cache cache = RandomCache(rng, p, /*apart=*/true);
  const std::vector<int> slots = StoreAnywhere(rng, p, cache);
  std::vector<double> out, lse;
  Reference(p, &out, &lse);
  for (const char* name : InstructionSets()) {
    cpu::ForceInstructionSet(name);
    for (const bool exact : {false, true}) {
      p.exact_weights = exact;
      CheckLarge(p, RunAttention(p, cache, slots, here), out, lse, size);
    }
  }
}

TEST(LargeScoresTest, MatchReferenceUpToTheLimit) {
  Rng rng(1);
  for (const DType dtype : kStored) {
    for (const DType q_dtype : kDTypes) {
      for (const float size : Magnitudes(dtype, q_dtype)) {
        for (const int head_dim : {40, 64}) {
          Problem p = LargeScores(rng, dtype, q_dtype, head_dim, size, kLengths);
          CheckOnEverySet(rng, p, size);
        }
      }
    }
  }
}

TEST(LargeScoresTest, VariantsMatchReference) {
  Rng rng(2);
  for (const DType dtype : kStored) {
    for (const LargeVariant variant : kLargeVariants) {
      const DType q_dtype = IsQuantized(dtype) ? DType::kBF16 : dtype;
      for (const float size : {2496.0f, dtype == DType::kF16 ? 59904.0f : 133120.0f}) {
        Problem p = LargeScores(rng, dtype, q_dtype, 64, size, kLengths);
        SetVariant(p, variant, size);
        CheckOnEverySet(rng, p, size);
      }
    }
  }
}

// A score that overflows float32 makes a row NaN and its lse infinite; rows that do not see the key are unaffected.
TEST(LargeScoresTest, OverflowIsNotSilent) {
  Rng rng(3);
  Inline here;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8, DType::kF8E4M3}) {
    for (const DType q_dtype : {DType::kF32, DType::kBF16}) {
      for (const int added : {2, 40}) {
        Problem p;
        p.head_dim = 64;
        p.dtype = dtype;
        p.q_dtype = q_dtype;
        const int before = 600, key = before + added - 1;  // the last row sees it
        FillProblem(rng, p, {{before, added}}, 0);
        SetElements(p, 1e20f, [&](int t) { return t == key ? 1 : (t % 5 == 0 ? -1 : 1e-20); });
        const Cache cache = RandomCache(rng, p, /*apart=*/true);
        const std::vector<int> slots = StoreAnywhere(rng, p, cache);
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          const Result result = RunAttention(p, cache, slots, here);
          for (int row = 0; row < added; ++row) {
            const bool overflows = before + row >= key;
            for (int d = 0; d < p.head_dim; ++d) {
              const double got = Read(&result.out[(row * p.head_dim + d) * ItemSize(q_dtype)], q_dtype);
              EXPECT_EQ(std::isnan(got), overflows) << row << " " << Describe(p);
            }
            EXPECT_EQ(result.lse[row] == std::numeric_limits<float>::infinity(), overflows) << Describe(p);
            EXPECT_FALSE(std::isnan(result.lse[row])) << Describe(p);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
