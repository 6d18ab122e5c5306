// Decode attention with quantized storage where its integer arithmetic could go wrong: magnitudes at both ends, queries
// with elements of very different sizes, tokens that a row must not see.
#include <gtest/gtest.h>

#include "tests/kernels_util.h"

namespace kvpage::testing {
namespace {

constexpr DType kQuantized[] = {DType::kI8, DType::kF8E4M3};

void Scale(std::vector<char>& data, DType dtype, float factor) {
  for (std::size_t i = 0; i < data.size(); i += ItemSize(dtype)) Write(&data[i], dtype, Read(&data[i], dtype) * factor);
}

// Returns the largest difference from the reference, in units of the largest output.
double RelativeError(const Problem& p, const Result& result, const std::vector<double>& out) {
  double worst = 0, size = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double error = std::fabs(Read(&result.out[i * ItemSize(p.q_dtype)], p.q_dtype) - out[i]);
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
    size = std::max(size, std::fabs(out[i]));
  }
  return worst / size;
}

TEST(QuantizedDecodeTest, QueriesKeysAndValuesOfAnyMagnitude) {
  Rng rng(1);
  Inline here;
  for (const DType dtype : kQuantized) {
    for (const DType q_dtype : {DType::kF32, DType::kBF16}) {
      for (const auto& [q, k, v] : {std::array<float, 3>{1e-30f, 1e30f, 1e-33f}, {1e30f, 1e-30f, 1e33f}}) {
        Problem p;
        p.group = 4;
        p.dtype = dtype;
        p.q_dtype = q_dtype;
        FillProblem(rng, p, {{150, 1}, {0, 1}}, 0);
        Scale(p.q, q_dtype, q);
        for (std::vector<float>& context : p.contexts) {
          for (std::size_t i = 0; i < context.size(); ++i) context[i] *= i < context.size() / 2 ? k : v;
        }
        const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 2, p.max_tokens(), 16);
        Store(p, cache, Slots(2));
        std::vector<double> out, lse;
        Reference(p, &out, &lse);
        for (const char* name : InstructionSets()) {
          cpu::ForceInstructionSet(name);
          const double error = RelativeError(p, RunAttention(p, cache, Slots(2), here), out);
          EXPECT_LT(error, (q_dtype == DType::kF32 ? 4e-6 : 5e-3)) << error << " " << name << " " << q << " " << v;
        }
      }
    }
  }
}

// The largest query element meets a key of 0, so all others matter: none of their bits may be lost because of it.
TEST(QuantizedDecodeTest, SmallElementsOfAQueryCount) {
  Rng rng(2);
  Inline here;
  for (const DType q_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const float small : {1.0f / 64, 1.0f / 1000, 1.0f / 30000}) {
      Problem p;
      p.group = 3;
      p.dtype = DType::kI8;
      p.q_dtype = q_dtype;
      FillProblem(rng, p, {{90, 1}}, 0);
      Scale(p.q, q_dtype, small);
      for (int h = 0; h < 3; ++h) Write(&p.q[h * p.head_dim * ItemSize(q_dtype)], q_dtype, 1.0f);
      for (int t = 0; t < p.tokens(0); ++t) p.At(0, 0, t, 0, 0) = 0.0f;
      p.scale = 1.0f;
      const Cache cache(rng, Layout::kPerLayer, p.dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
      Store(p, cache, {0});
      std::vector<double> out, lse;
      Reference(p, &out, &lse);
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        const Result result = RunAttention(p, cache, {0}, here);
        // Rounding to 2^-24 of the largest element, times keys of about 1, 64 of them.
        for (std::size_t i = 0; i < lse.size(); ++i)
          EXPECT_LT(std::fabs(result.lse[i] - lse[i]), 4e-6) << name << " " << small;
      }
    }
  }
}

// Just below a power of two, integers made of signed bytes only would be too small for their number of bits.
TEST(QuantizedDecodeTest, LargestElementsBelowAPowerOfTwo) {
  Rng rng(5);
  Inline here;
  for (const DType q_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const float largest = q_dtype == DType::kF32 ? 0x1.fffffep0f : (q_dtype == DType::kF16 ? 0x1.ffcp0f : 0x1.fep0f);
    Problem p;
    p.group = 2;
    p.dtype = DType::kI8;
    p.q_dtype = q_dtype;
    FillProblem(rng, p, {{90, 1}}, 0);
    Scale(p.q, q_dtype, 0.1f);
    for (int h = 0; h < 2; ++h) {
      Write(&p.q[(h * p.head_dim + 9) * ItemSize(q_dtype)], q_dtype, h == 0 ? largest : -largest);
    }
    const Cache cache(rng, Layout::kFused, p.dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
    Store(p, cache, {0});
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result result = RunAttention(p, cache, {0}, here);
      for (std::size_t i = 0; i < lse.size(); ++i) EXPECT_LT(std::fabs(result.lse[i] - lse[i]), 4e-6) << name;
    }
  }
}

TEST(QuantizedDecodeTest, QueriesOfZeroAverage) {
  Rng rng(3);
  Inline here;
  for (const DType dtype : kQuantized) {
    Problem p;
    p.group = 2;
    p.dtype = dtype;
    p.q_dtype = DType::kBF16;
    FillProblem(rng, p, {{77, 1}}, 0);
    std::fill(p.q.begin(), p.q.end(), 0);
    const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
    Store(p, cache, {0});
    std::vector<double> out, lse;
    Reference(p, &out, &lse);
    for (const char* name : InstructionSets()) {
      cpu::ForceInstructionSet(name);
      const Result result = RunAttention(p, cache, {0}, here);
      EXPECT_LT(RelativeError(p, result, out), 5e-3) << name;
      EXPECT_LT(std::fabs(result.lse[0] - std::log(78.0)), 1e-5) << name;
    }
  }
}

// Three new tokens: neither what the last one holds, nor what has left the window, changes a bit of the first one's
// result.
TEST(QuantizedDecodeTest, WhatARowDoesNotSeeChangesNoBit) {
  Rng rng(4);
  Inline here;
  for (const DType dtype : kQuantized) {
    for (const DType q_dtype : {DType::kF32, DType::kBF16}) {
      Problem p;
      p.group = 2;
      p.dtype = dtype;
      p.q_dtype = q_dtype;
      p.window = 50;
      FillProblem(rng, p, {{100, 3}}, 0);
      const Cache cache(rng, Layout::kFused, dtype, 1, p.head_dim, 1, p.max_tokens(), 16);
      for (const char* name : InstructionSets()) {
        cpu::ForceInstructionSet(name);
        Store(p, cache, {0});
        const Result before = RunAttention(p, cache, {0}, here);
        for (const int token : {100 - 50, 102}) {
          for (int which = 0; which < 2; ++which) *cache.ScaleAt(0, token, which, 0) *= 1000.0f;
        }
        const Result after = RunAttention(p, cache, {0}, here);
        const std::size_t row = before.out.size() / 3;
        EXPECT_EQ(std::memcmp(&before.out[0], &after.out[0], row), 0) << "the first " << name;
        EXPECT_EQ(std::memcmp(&before.out[row], &after.out[row], row), 0) << "the second " << name;
        EXPECT_NE(std::memcmp(&before.out[2 * row], &after.out[2 * row], row), 0) << "the third " << name;
      }
    }
  }
}

}  // namespace
}  // namespace kvpage::testing
