// Problems with scores far larger than float32 can resolve, for the tests of all attention kernels. Every key is a
// multiple of the query, so scores are either equal or differ by more than rounding could change.
#ifndef KVPAGE_TESTS_LARGE_SCORES_H_
#define KVPAGE_TESTS_LARGE_SCORES_H_

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "tests/kernels_util.h"

namespace kvpage::testing {

// Scores reach 3e38, which overflows float32 when multiplied by log2(e), for heads of up to 64 (see LargeScores).
inline constexpr float kLargestElement = 0x1.e4p60f;

// Magnitudes of the elements of queries and keys; the largest for float16 is 65504.
inline std::vector<float> Magnitudes(DType dtype, DType q_dtype) {
  std::vector<float> sizes = {1e2f, 2.5e3f, 6e4f, 65504.0f};
  if (dtype != DType::kF16 && q_dtype != DType::kF16) {
    for (const float size : {133120.0f, 1e9f, 1e15f, kLargestElement}) sizes.push_back(size);
  }
  return sizes;
}

// Sets all queries to `size` times a pattern of signs, and the key of token t to factor(t) times that.
template <class Factor>
void SetElements(Problem& p, float size, const Factor& factor) {
  const auto sign = [](int d) { return d % 3 == 0 ? -1.0f : 1.0f; };
  for (std::size_t i = 0; i < p.q.size() / ItemSize(p.q_dtype); ++i) {
    Write(&p.q[i * ItemSize(p.q_dtype)], p.q_dtype, size * sign(static_cast<int>(i) % p.head_dim));
  }
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    for (int t = 0; t < p.tokens(s); ++t) {
      for (int h = 0; h < p.kv_heads; ++h) {
        for (int d = 0; d < p.head_dim; ++d) {
          p.At(static_cast<int>(s), 0, t, h, d) = size * sign(d) * static_cast<float>(factor(t));
        }
      }
    }
  }
}

// lengths: {tokens before, new tokens} of every sequence. The largest score first appears after several smaller ones,
// and then often.
inline Problem LargeScores(Rng& rng, DType dtype, DType q_dtype, int head_dim, float size,
                           const std::vector<std::pair<int, int>>& lengths) {
  Problem p;
  p.kv_heads = 2;
  p.group = 2;
  p.head_dim = head_dim;
  p.dtype = dtype;
  p.q_dtype = q_dtype;
  FillProblem(rng, p, lengths, 1);
  if (size == kLargestElement) p.scale = 64.0f / static_cast<float>(head_dim);
  constexpr double kFactors[] = {1, 0.5, 1, -1, 0.25, 1, 0.75};
  SetElements(p, size, [&](int t) { return t < 3 ? 0.25 : (t < 70 ? 0.5 : kFactors[t % 7]); });
  return p;
}

// Returns the score of a key that equals the query.
inline float LargestScore(const Problem& p, float size) {
  return static_cast<float>(static_cast<double>(size) * size * p.head_dim * p.scale);
}

enum class LargeVariant { kPlain, kWindow, kSoftCap, kAlibi, kSink, kAll };
inline constexpr LargeVariant kLargeVariants[] = {LargeVariant::kPlain, LargeVariant::kWindow, LargeVariant::kSoftCap,
                                                  LargeVariant::kAlibi, LargeVariant::kSink,   LargeVariant::kAll};

// Sets options whose size matters next to such scores. Sinks tie where the dot products are exact in float32, because
// `size` has few significant bits.
inline void SetVariant(Problem& p, LargeVariant variant, float size) {
  const float largest = LargestScore(p, size);
  const bool all = variant == LargeVariant::kAll;
  if (all || variant == LargeVariant::kWindow) p.window = 90;
  if (all || variant == LargeVariant::kSoftCap) p.soft_cap = 0.7f * largest;
  if (all || variant == LargeVariant::kAlibi) p.slopes.assign(p.q_heads(), largest / 4096);
  // A sink equal to the largest score has the same weight; a much larger one has all of the weight.
  if (all || variant == LargeVariant::kSink) {
    p.sinks = {IsQuantized(p.dtype) ? 0.75f * largest : largest, 0.0f, 0.875f * largest, 1.0625f * largest};
  }
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_LARGE_SCORES_H_
