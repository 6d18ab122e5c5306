// Tensor core attention with int8 and float8 storage on the emulated device, against a reference in double precision.
#include <gtest/gtest.h>

#include "kernels/cuda/dequantize.cuh"
#include "tests/cuda_attention_util.h"
#include "tests/rounds.h"

namespace kvpage::testing {
namespace {

constexpr DType kQuantized[] = {DType::kI8, DType::kF8E4M3};
constexpr DType kQueries[] = {DType::kBF16, DType::kF16};

// Returns the problem of round 0, 1, 2, ...: every storage type with every query type, then every head size.
Problem SomeProblem(int round) {
  Problem p;
  p.dtype = kQuantized[round % 2];
  p.q_dtype = kQueries[round / 2 % 2];
  p.head_dim = 64 << round / 4 % 3;
  return p;
}

template <class S, class T>
void CheckDequantize() {
  for (std::uint32_t code = 0; code < 256; ++code) {
    const std::uint32_t bytes = code | (255 - code) << 8 | (code ^ 0x80) << 16 | (code ^ 0x55) << 24;
    const std::uint32_t even = cuda::Dequantize<S, T>::Even(bytes), odd = cuda::Dequantize<S, T>::Odd(bytes);
    for (int i = 0; i < 4; ++i) {
      const auto byte = static_cast<unsigned char>(bytes >> 8 * i);
      S stored;
      std::memcpy(&stored, &byte, 1);
      const float got = cuda::Element(T{}, i % 2 == 0 ? even : odd, i / 2);
      EXPECT_EQ(got, cuda::ToFloat(stored)) << static_cast<int>(byte);
      EXPECT_EQ(std::signbit(got), std::signbit(cuda::ToFloat(stored))) << static_cast<int>(byte);
    }
  }
}

TEST(CudaQuantizedAttentionTest, ElementsAreExact) {
  CheckDequantize<cuda::Int8, cuda::Bf16>();
  CheckDequantize<cuda::Int8, cuda::F16>();
  CheckDequantize<cuda::Float8, cuda::Bf16>();
  CheckDequantize<cuda::Float8, cuda::F16>();
}

TEST(CudaQuantizedAttentionTest, TensorCoresServeTheseCases) {
  for (int round = 0; round < 12; ++round) {
    Problem p = SomeProblem(round);
    EXPECT_TRUE(UsesTensorCores(p)) << DescribeCuda(p);
    p.exact_weights = true;
    EXPECT_FALSE(UsesTensorCores(p)) << DescribeCuda(p);
    p.exact_weights = false;
    p.q_dtype = DType::kF32;
    EXPECT_FALSE(UsesTensorCores(p)) << DescribeCuda(p);
  }
}

TEST(CudaQuantizedAttentionTest, MatchesReference) {
  Rng rng(1);
  for (int round = 0; round < Rounds(36); ++round) {
    Problem p = SomeProblem(round);
    p.kv_heads = Pick(rng, 1, 3);
    p.group = PickOf(rng, {1, 2, 3, 4, 7, 8, 16});
    p.exact_weights = round % 12 == 11;
    AddOptions(rng, p);
    FillProblem(rng, p, RandomLengths(rng, 900), Pick(rng, 0, 2));
    CheckAnywhere(rng, p, true);
  }
}

// All kinds of chunks that the copies distinguish: a tile lies in one chunk, consists of several, or neither.
TEST(CudaQuantizedAttentionTest, ChunksOfAnySize) {
  Rng rng(2);
  for (int round = 0; round < 12; ++round) {
    Problem p = SomeProblem(round);
    p.kv_heads = 2;
    p.group = 4;
    FillProblem(rng, p, {{400, 1}, {130, 3}, {5, 1}}, 0);
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    Result first;
    for (const int chunk : {8, 16, 32, 48, 64, 128, 200, 256}) {
      const Layout layout = PickOf(rng, {Layout::kFused, Layout::kPerLayer, Layout::kTableNhd, Layout::kTableHnd});
      const Cache cache(rng, layout, p.dtype, p.kv_heads, p.head_dim, 3, p.max_tokens(), chunk);
      Store(p, cache, Slots(3));
      const ScopedDevice device(Pick(rng, 1, 6), rng());
      const Result result = RunCuda(p, cache, Slots(3));
      if (first.out.empty()) {
        first = result;
        CheckCuda(p, result, out, lse, true);
      }
      EXPECT_EQ(result, first) << "chunks of " << chunk << " " << DescribeCuda(p);
    }
  }
}

// Results have the same bits however units are split, and for any neighbours.
TEST(CudaQuantizedAttentionTest, BitsDoNotDependOnSurroundings) {
  Rng rng(3);
  for (int round = 0; round < 4; ++round) {
    Problem p = SomeProblem(round);
    p.kv_heads = 2;
    p.group = PickOf(rng, {1, 4, 7});
    p.head_dim = round == 3 ? 128 : 64;
    if (round == 2) p.window = 500;
    FillProblem(rng, p, {{1900, 1}, {30, 1}, {600, 2}, {900, 24}, {1, 1}}, 0);
    const std::size_t n = p.sequences.size();
    const Cache cache(rng, Layout::kFused, p.dtype, 2, p.head_dim, static_cast<int>(n), p.max_tokens(), 64);
    Store(p, cache, Slots(n));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const Result expected = RunCuda(p, cache, Slots(n));
    CheckCuda(p, expected, out, lse, true);
    for (const int sms : {1, 9, 30}) {
      const ScopedDevice device(sms, rng());
      EXPECT_EQ(RunCuda(p, cache, Slots(n)), expected) << sms << " multiprocessors " << DescribeCuda(p);
    }
    const std::size_t row = p.q.size() / static_cast<std::size_t>(p.num_tokens);
    for (std::size_t s = 0; s < n; ++s) {
      const ScopedDevice device(Pick(rng, 1, 12), rng());
      CudaRun run;
      run.only = static_cast<int>(s);
      const Result alone = RunCuda(p, cache, Slots(n), run);
      const auto begin = static_cast<std::size_t>(p.sequences[s].query_begin) * row;
      EXPECT_EQ(std::memcmp(&alone.out[begin], &expected.out[begin],
                            static_cast<std::size_t>(p.sequences[s].query_length) * row),
                0)
          << "sequence " << s << " alone " << DescribeCuda(p);
    }
  }
}

// A row whose scale is NaN reads as NaN and affects only the rows that see it, whatever the size of its neighbours.
TEST(CudaQuantizedAttentionTest, NaNReachesThoseWhoSeeIt) {
  Rng rng(4);
  for (int round = 0; round < 24; ++round) {
    Problem p = SomeProblem(round);
    p.group = 2;
    if (round % 3 == 0) p.window = 40;
    FillProblem(rng, p, {{300, 5}, {70, 60}}, 1);
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const int which = round / 12;  // keys, values
    std::vector<int> bad;
    for (int s = 0; s < 2; ++s) {
      bad.push_back(p.sequences[s].position + p.sequences[s].query_length / 2);
      p.At(s, which, bad[s], 0, 3) = std::nanf("");
      // A position before every row's window.
      if (p.window > 0) p.At(s, 1, p.sequences[s].position - p.window, 0, 1) = std::nanf("");
    }
    const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 2, p.max_tokens(), 16);
    Store(p, cache, Slots(2));
    const Result result = RunCuda(p, cache, Slots(2));
    for (int s = 0; s < 2; ++s) {
      for (int i = 0; i < p.sequences[s].query_length; ++i) {
        const int token = p.sequences[s].query_begin + i, position = p.sequences[s].position + i;
        const bool sees = position >= bad[s] && (p.window == 0 || position - bad[s] < p.window);
        for (int h = 0; h < p.q_heads(); ++h) {
          for (int d = 0; d < p.head_dim; ++d) {
            const std::size_t at = (static_cast<std::size_t>(token) * p.q_heads() + h) * p.head_dim + d;
            const double got = Read(&result.out[at * 2], p.q_dtype);
            ASSERT_EQ(std::isnan(got), sees) << "sequence " << s << " token " << i << " " << DescribeCuda(p);
            ASSERT_TRUE(sees || std::fabs(got - out[at]) < 0.02) << got << " " << out[at] << " " << DescribeCuda(p);
          }
        }
      }
    }
  }
}

// Values large or small for float16 that change from token to token; only the last row sees the largest one.
TEST(CudaQuantizedAttentionTest, ValuesOfAnySize) {
  Rng rng(5);
  for (int round = 0; round < 24; ++round) {
    Problem p = SomeProblem(round);
    p.kv_heads = 1;
    p.group = 2;
    FillProblem(rng, p, {{600, 4}}, 0);
    const float size = p.q_dtype == DType::kF16 ? (round < 12 ? 3e3f : 1e-2f) : (round < 12 ? 1e30f : 1e-30f);
    for (int t = 0; t < p.tokens(0); ++t) {
      const float of_token = t == p.tokens(0) - 1 ? 8 * size : size * (t < 300 ? 0.01f : 1.0f);
      for (int d = 0; d < p.head_dim; ++d) p.At(0, 1, t, 0, d) *= of_token;
    }
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const Cache cache = RandomCache(rng, p);
    const Result result = RunCuda(p, cache, StoreAnywhere(rng, p, cache));
    const double unit = p.q_dtype == DType::kBF16 ? 1.0 / 256 : 1.0 / 2048;
    const std::size_t row = static_cast<std::size_t>(p.head_dim);
    for (std::size_t from = 0; from < out.size(); from += row) {
      double difference = 0, norm = 0;
      for (std::size_t i = from; i < from + row; ++i) {
        difference += std::pow(Read(&result.out[i * 2], p.q_dtype) - out[i], 2);
        norm += out[i] * out[i];
      }
      EXPECT_LT(std::sqrt(difference / norm),
                1.5 * unit + (round < 12 ? 0 : 0x1p-25 / size * (p.q_dtype == DType::kF16)))
          << from / row << " " << DescribeCuda(p);
    }
  }
}

TEST(CudaQuantizedAttentionTest, LongContexts) {
  Rng rng(6);
  for (int round = 0; round < 4; ++round) {
    Problem p = SomeProblem(round);
    FillProblem(rng, p, {{17500, 1 + 17 * (round % 2)}, {300, 1}}, 0);
    const Cache cache(rng, Layout::kPerLayer, p.dtype, 1, p.head_dim, 2, p.max_tokens(), 64);
    Store(p, cache, Slots(2));
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    const Result expected = RunCuda(p, cache, Slots(2));
    CheckCuda(p, expected, out, lse, true);
    const ScopedDevice device(50, rng());
    EXPECT_EQ(RunCuda(p, cache, Slots(2)), expected) << DescribeCuda(p);
  }
}

}  // namespace
}  // namespace kvpage::testing
