// The CUDA attention kernels on the emulated device with scores up to the largest float32, and beyond.
#include <gtest/gtest.h>

#include "tests/cuda_attention_util.h"
#include "tests/large_scores.h"

namespace kvpage::testing {
namespace {

const std::vector<std::pair<int, int>> kLengths = {{560, 1}, {150, 20}, {0, 1}};

// Checks the tensor core kernels where they exist, and the general kernel.
void CheckKernels(Rng& rng, Problem& p, float size) {
  const StoredProblem stored(rng, p);
  for (const bool aligned : {true, false}) {
    if (aligned && !UsesTensorCores(p)) continue;
    CudaRun run;
    run.aligned = aligned;
    stored.Check(run, aligned, "size " + std::to_string(size));
  }
}

TEST(CudaLargeScoresTest, MatchReferenceUpToTheLimit) {
  Rng rng(1);
  for (const DType dtype : kStored) {
    std::vector<DType> queries = {dtype};
    if (IsQuantized(dtype)) queries = {DType::kF32, DType::kBF16, DType::kF16};
    for (const DType q_dtype : queries) {
      for (const float size : Magnitudes(dtype, q_dtype)) {
        Problem p = LargeScores(rng, dtype, q_dtype, 64, size, kLengths);
        CheckKernels(rng, p, size);
      }
    }
  }
}

TEST(CudaLargeScoresTest, VariantsMatchReference) {
  Rng rng(2);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const LargeVariant variant : kLargeVariants) {
      for (const float size : {2496.0f, dtype == DType::kF16 ? 59904.0f : 133120.0f}) {
        Problem p = LargeScores(rng, dtype, dtype, 64, size, kLengths);
        SetVariant(p, variant, size);
        CheckKernels(rng, p, size);
      }
    }
  }
}

// A score that overflows float32 makes a row NaN and its lse infinite; rows that do not see the key are unaffected.
TEST(CudaLargeScoresTest, OverflowIsNotSilent) {
  Rng rng(3);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (const int added : {2, 40}) {
      Problem p;
      p.head_dim = 64;
      p.dtype = dtype;
      p.q_dtype = IsQuantized(dtype) ? DType::kF32 : dtype;
      const int before = 100, key = before + added - 1;  // the last row sees it
      FillProblem(rng, p, {{before, added}}, 0);
      SetElements(p, 1e20f, [&](int t) { return t == key ? 1 : (t % 5 == 0 ? -1 : 1e-20); });
      const Cache cache = RandomCache(rng, p);
      const std::vector<int> slots = StoreAnywhere(rng, p, cache);
      const Result result = RunCuda(p, cache, slots);
      for (int row = 0; row < added; ++row) {
        const bool overflows = before + row >= key;
        for (int d = 0; d < p.head_dim; ++d) {
          const double got = Read(&result.out[(row * p.head_dim + d) * ItemSize(p.q_dtype)], p.q_dtype);
          EXPECT_EQ(std::isnan(got), overflows) << row << " " << DescribeCuda(p);
        }
        EXPECT_EQ(result.lse[row] == std::numeric_limits<float>::infinity(), overflows) << DescribeCuda(p);
        EXPECT_FALSE(std::isnan(result.lse[row])) << DescribeCuda(p);
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
