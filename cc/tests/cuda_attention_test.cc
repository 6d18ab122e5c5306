// The CUDA attention kernels on the emulated device, against a reference in double precision.
#include <gtest/gtest.h>

#include "tests/cuda_attention_util.h"
#include "tests/rounds.h"

namespace kvpage::testing {
namespace {

constexpr DType kQueries[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr DType kStored[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kI8, DType::kF8E4M3};

TEST(CudaAttentionTest, GeneralMatchesReference) {
  Rng rng(1);
  for (int round = 0; round < Rounds(24); ++round) {
    Problem p;
    p.kv_heads = Pick(rng, 1, 3);
    p.group = PickOf(rng, {1, 2, 3, 4, 7, 16});
    p.head_dim = PickOf(rng, {1, 5, 16, 33, 64, 100, 128, 264});
    p.dtype = kStored[round % 5];
    p.q_dtype = kQueries[Pick(rng, 0, 2)];
    AddOptions(rng, p);
    FillProblem(rng, p, RandomLengths(rng, 700), Pick(rng, 0, 2));
    CheckAnywhere(rng, p, false);
  }
}

TEST(CudaAttentionTest, DecodeMatchesReference) {
  Rng rng(2);
  for (int round = 0; round < Rounds(20); ++round) {
    Problem p;
    p.kv_heads = Pick(rng, 1, 3);
    p.group = PickOf(rng, {1, 2, 3, 4, 7, 8, 16});
    p.head_dim = PickOf(rng, {64, 128, 256});
    p.exact_weights = round % 5 == 4;
    p.dtype = p.q_dtype = round % 2 == 0 ? DType::kBF16 : DType::kF16;
    AddOptions(rng, p);
    std::vector<std::pair<int, int>> lengths;
    for (int s = Pick(rng, 1, 5); s > 0; --s) {
      const int before = PickOf(rng, {0, Pick(rng, 1, 63), Pick(rng, 64, 300), Pick(rng, 0, 1500)});
      lengths.emplace_back(before, Pick(rng, 1, 16 / p.group));
    }
    FillProblem(rng, p, lengths, Pick(rng, 0, 2));
    CheckAnywhere(rng, p, true);
  }
}

TEST(CudaAttentionTest, PrefillMatchesReference) {
  Rng rng(3);
  for (int round = 0; round < Rounds(16); ++round) {
    Problem p;
    p.kv_heads = Pick(rng, 1, 2);
    p.group = PickOf(rng, {1, 2, 3, 4, 7, 8});
    p.head_dim = round % 4 == 3 ? 256 : PickOf(rng, {64, 128});
    p.exact_weights = round % 5 == 4;
    p.dtype = p.q_dtype = round % 2 == 0 ? DType::kBF16 : DType::kF16;
    AddOptions(rng, p);
    std::vector<std::pair<int, int>> lengths = {
        {PickOf(rng, {0, Pick(rng, 1, 200), Pick(rng, 900, 2500)}), Pick(rng, 17, 90)}};
    for (int s = Pick(rng, 0, 2); s > 0; --s) lengths.emplace_back(Pick(rng, 0, 300), Pick(rng, 1, 30));
    std::shuffle(lengths.begin(), lengths.end(), rng);
    FillProblem(rng, p, lengths, Pick(rng, 0, 2));
    CheckAnywhere(rng, p, true);
  }
}

// Results have the same bits for any number of multiprocessors (which decides how units are split), any order of blocks
// and threads, any neighbours and any chunk placement.
TEST(CudaAttentionTest, BitsDoNotDependOnSurroundings) {
  Rng rng(4);
  for (int round = 0; round < 5; ++round) {
    Problem p;
    p.kv_heads = 2;
    p.group = PickOf(rng, {1, 4, 7});
    p.head_dim = round % 2 == 0 ? PickOf(rng, {64, 64, 128}) : 24;
    p.dtype = round % 2 == 0 ? PickOf(rng, {DType::kBF16, DType::kF16}) : kStored[round / 2];
    p.q_dtype = round % 2 == 0 ? p.dtype : DType::kF32;
    if (round == 2) p.window = 1100;
    FillProblem(rng, p, {{1900, 1}, {30, 1}, {600, 2}, {2100, 24}, {1, 1}}, 0);
    const int n = static_cast<int>(p.sequences.size());
    const Cache home(rng, Layout::kFused, p.dtype, 2, p.head_dim, n, p.max_tokens(), 16);
    Store(p, home, Slots(n));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const Result expected = RunCuda(p, home, Slots(n));
    CheckCuda(p, expected, out, lse, UsesTensorCores(p));
    for (const int sms : {1, 9, 30}) {
      const ScopedDevice device(sms, rng());
      EXPECT_EQ(RunCuda(p, home, Slots(n)), expected) << sms << " multiprocessors " << DescribeCuda(p);
    }
    const std::size_t row = p.q.size() / p.num_tokens;
    for (int s = 0; s < n; ++s) {
      const ScopedDevice device(Pick(rng, 1, 12), rng());
      CudaRun run;
      run.only = s;
      run.padding = Pick(rng, 0, 3);
      const Result alone = RunCuda(p, home, Slots(n), run);
      const Sequence& sequence = p.sequences[s];
      EXPECT_EQ(std::memcmp(&alone.out[sequence.query_begin * row], &expected.out[sequence.query_begin * row],
                            sequence.query_length * row),
                0)
          << "sequence " << s << " alone " << DescribeCuda(p);
    }
    for (const int chunk : {12, 48, 200}) {
      const ScopedDevice device(3, rng());
      const Cache other(rng, PickOf(rng, {Layout::kPerLayer, Layout::kTableHnd}), p.dtype, 2, p.head_dim, n + 1,
                        p.max_tokens(), chunk);
      std::vector<int> slots = Slots(n + 1);
      std::shuffle(slots.begin(), slots.end(), rng);
      slots.pop_back();
      Store(p, other, slots);
      EXPECT_EQ(RunCuda(p, other, slots), expected) << "chunks of " << chunk << " " << DescribeCuda(p);
    }
  }
}

// Masked positions may hold anything, including infinities and NaN, in keys and in values.
TEST(CudaAttentionTest, WhatIsNotSeenDoesNotMatter) {
  Rng rng(5);
  const float infinity = std::numeric_limits<float>::infinity();
  for (int round = 0; round < 6; ++round) {
    Problem p;
    p.kv_heads = 1;
    p.group = 2;
    p.head_dim = PickOf(rng, {64, 128, 256});
    p.dtype = p.q_dtype = PickOf(rng, {DType::kBF16, DType::kF16, DType::kF32});
    if (round % 2 == 0) p.window = 40;
    FillProblem(rng, p, {{300, 5}, {70, 60}}, 1);
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    // From this position on, a token of each sequence is not finite: earlier rows must be unaffected.
    std::vector<int> bad;
    for (int s = 0; s < 2; ++s) {
      const int token = p.sequences[s].position + p.sequences[s].query_length / 2;
      bad.push_back(token);
      for (int which = 0; which < 2; ++which) {
        for (int d = 0; d < p.head_dim; d += 3) {
          p.At(s, which, token, 0, d) = PickOf(rng, {infinity, -infinity, std::nanf("")});
        }
      }
      // A position before every row's window.
      if (p.window > 0) p.At(s, 1, p.sequences[s].position - p.window, 0, 1) = std::nanf("");
    }
    const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 2, p.max_tokens(), 16);
    Store(p, cache, Slots(2));
    const Result result = RunCuda(p, cache, Slots(2));
    const double unit = p.q_dtype == DType::kF32 ? 1e-5 : 0.02;
    for (int s = 0; s < 2; ++s) {
      for (int i = 0; i < p.sequences[s].query_length; ++i) {
        const int token = p.sequences[s].query_begin + i, position = p.sequences[s].position + i;
        for (int h = 0; h < p.q_heads(); ++h) {
          double worst = 0;
          bool nan = false;
          for (int d = 0; d < p.head_dim; ++d) {
            const std::size_t at = (static_cast<std::size_t>(token) * p.q_heads() + h) * p.head_dim + d;
            const double got = Read(&result.out[at * ItemSize(p.q_dtype)], p.q_dtype);
            nan = nan || !std::isfinite(got);
            worst = std::max(worst, std::fabs(got - out[at]));
          }
          const bool sees = position >= bad[s];
          EXPECT_EQ(nan, sees) << "sequence " << s << " token " << i << " " << DescribeCuda(p);
          EXPECT_TRUE(sees || worst < unit) << worst << " sequence " << s << " token " << i << " " << DescribeCuda(p);
        }
      }
    }
  }
}

// Infinite values reach the rows that see them as infinities, although a separate product handles them.
TEST(CudaAttentionTest, InfinitiesKeepTheirSign) {
  Rng rng(6);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int queries : {4, 40}) {
      Problem p;
      p.kv_heads = 1;
      p.group = 1;
      p.head_dim = 64;
      p.dtype = p.q_dtype = dtype;
      FillProblem(rng, p, {{20, queries}}, 0);
      const int token = 20 + queries / 2;
      p.At(0, 1, token, 0, 3) = std::numeric_limits<float>::infinity();
      p.At(0, 1, token, 0, 8) = -std::numeric_limits<float>::infinity();
      p.At(0, 1, token, 0, 9) = std::nanf("");
      const Cache cache(rng, Layout::kFused, dtype, 1, 64, 1, p.max_tokens(), 16);
      Store(p, cache, Slots(1));
      const Result result = RunCuda(p, cache, Slots(1));
      for (int i = 0; i < queries; ++i) {
        const auto got = [&](int d) { return Read(&result.out[(i * 64 + d) * ItemSize(dtype)], dtype); };
        if (20 + i < token) {
          EXPECT_TRUE(std::isfinite(got(3)) && std::isfinite(got(8)) && std::isfinite(got(9)))
              << i << " " << DescribeCuda(p);
        } else {
          EXPECT_TRUE(std::isinf(got(3)) && got(3) > 0 && std::isinf(got(8)) && got(8) < 0 && std::isnan(got(9)))
              << i << " " << got(3) << " " << got(8) << " " << got(9) << " " << DescribeCuda(p);
        }
        EXPECT_TRUE(std::isfinite(got(2))) << i << " " << DescribeCuda(p);
      }
    }
  }
}

// Contexts with spans longer than the minimum.
TEST(CudaAttentionTest, LongContexts) {
  Rng rng(8);
  for (const int queries : {1, 18}) {
    Problem p;
    p.kv_heads = 1;
    p.group = 1;
    p.head_dim = 64;
    p.dtype = p.q_dtype = DType::kBF16;
    FillProblem(rng, p, {{17500, queries}, {300, 1}}, 0);
    const Cache cache(rng, Layout::kPerLayer, p.dtype, 1, 64, 2, p.max_tokens(), 16);
    Store(p, cache, Slots(2));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const Result expected = RunCuda(p, cache, Slots(2));
    CheckCuda(p, expected, out, lse, true);
    for (const int sms : {1, 50}) {
      const ScopedDevice device(sms, rng());
      EXPECT_EQ(RunCuda(p, cache, Slots(2)), expected) << sms << " multiprocessors " << DescribeCuda(p);
    }
  }
}

// More sequences than the planner has threads.
TEST(CudaAttentionTest, ManySequences) {
  Rng rng(9);
  for (const DType dtype : {DType::kF16, DType::kF32}) {
    Problem p;
    p.kv_heads = 2;
    p.group = 2;
    p.head_dim = 64;
    p.dtype = p.q_dtype = dtype;
    std::vector<std::pair<int, int>> lengths;
    for (int s = 0; s < 600; ++s) lengths.emplace_back(Pick(rng, 0, s % 50 == 0 ? 500 : 20), s % 97 == 0 ? 12 : 1);
    FillProblem(rng, p, lengths, 0);
    const int n = static_cast<int>(lengths.size());
    const Cache cache(rng, Layout::kFused, dtype, 2, 64, n, p.max_tokens(), 32);
    Store(p, cache, Slots(lengths.size()));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    CudaRun run;
    run.padding = 7;
    const Result expected = RunCuda(p, cache, Slots(lengths.size()), run);
    CheckCuda(p, expected, out, lse, UsesTensorCores(p));
    const ScopedDevice device(25, rng());
    EXPECT_EQ((RunCuda(p, cache, Slots(lengths.size()))), expected) << DescribeCuda(p).substr(0, 100);
  }
}

TEST(CudaAttentionTest, FailedChecksGiveNaN) {
  Rng rng(7);
  for (const DType dtype : kQueries) {
    Problem p;
    p.kv_heads = 2;
    p.group = 3;
    p.head_dim = 64;
    p.dtype = p.q_dtype = dtype;
    FillProblem(rng, p, {{20, 1}, {3, 30}}, 1);
    const Cache cache(rng, Layout::kFused, dtype, 2, 64, 2, p.max_tokens(), 16);
    CudaRun run;
    run.failed = true;
    const Result result = RunCuda(p, cache, Slots(2), run);
    for (std::size_t i = 0; i < result.out.size(); i += ItemSize(dtype)) {
      EXPECT_TRUE(std::isnan(Read(&result.out[i], dtype))) << i;
    }
    for (const float lse : result.lse) EXPECT_TRUE(std::isnan(lse));
  }
}

}  // namespace
}  // namespace kvpage::testing
