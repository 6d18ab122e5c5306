// Scores and their weights; merging and normalization of softmax states.
//
// Weights are 2^((score - largest score) * unit). The difference is computed first: it is 0 for the largest score and
// negative for all others, even for huge scores. A fused score * unit - largest * unit would be off by the rounding
// error of the second product, which is in the hundreds for scores near 1e10. Intrinsics keep the compiler from fusing.
#ifndef KVPAGE_KERNELS_CUDA_SOFTMAX_CUH_
#define KVPAGE_KERNELS_CUDA_SOFTMAX_CUH_

#include <cstdint>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float NegativeInfinity() { return __int_as_float(static_cast<int>(0xff800000)); }

// Whether only a scale follows the dot products. They then stay unscaled, and so do the largest scores of states. (A
// subnormal scale may be treated as 0, and masked scores times 0 are NaN.)
__device__ __forceinline__ bool OnlyScales(const AttentionParams& p) {
  return p.options.scale >= 1.17549435e-38f && !(p.options.soft_cap > 0.0f) && p.options.alibi_slopes == nullptr;
}
// A state's largest score times this is the largest score in natural units.
__device__ __forceinline__ float StateScale(const AttentionParams& p) { return OnlyScales(p) ? p.options.scale : 1.0f; }
// Factor that turns differences of scores into exponents of 2.
__device__ __forceinline__ float ScoreUnit(const AttentionParams& p) { return StateScale(p) * kLog2E; }

// Turns dot products into scores: scale, soft cap, ALiBi. kExact: use the library's tanh, which has a small relative
// error.
template <bool kExact>
struct ScoreRule {
  float factor;  // multiplies dot products; with a soft cap, the result is the argument of tanh or exp2
  float cap;     // 0 if there is none
  float unit;    // ScoreUnit
  bool plain;    // OnlyScales: scores are dot products
  bool alibi;

  __device__ __forceinline__ explicit ScoreRule(const AttentionParams& p) {
    const bool capped = p.options.soft_cap > 0.0f;
    // tanh(x / cap) = 1 - 2 / (1 + e^(2 x / cap))
    factor = capped ? p.options.scale / p.options.soft_cap * (kExact ? 1.0f : 2.0f * kLog2E) : p.options.scale;
    cap = capped ? p.options.soft_cap : 0.0f;
    unit = ScoreUnit(p);
    plain = OnlyScales(p);
    alibi = p.options.alibi_slopes != nullptr;
  }

  // `distance` is key position - query position.
  __device__ __forceinline__ float Score(float dot, float slope, std::int32_t distance) const {
    if (plain) return dot;
    float x = __fmul_rn(dot, factor);
    if (cap != 0.0f) {
      x = kExact ? __fmul_rn(cap, tanhf(x)) : cap - __fdividef(2.0f * cap, 1.0f + Exp2(x > 126.0f ? 126.0f : x));
    }
    if (alibi) x = __fmaf_rn(slope, static_cast<float>(distance), x);
    return x;
  }
};

// The weight of a score. No score may be above `base`.
__device__ __forceinline__ float Weight(float score, float base, float unit) {
  return Exp2(__fmul_rn(__fsub_rn(score, base), unit));
}

// The maximum to subtract in exponents: 0 while all scores are -inf, so that weights are 0, not 2^(-inf + inf).
__device__ __forceinline__ float Base(float max) { return max == NegativeInfinity() ? 0.0f : max; }

// The merge of two states: values * a + other values * b. Uses intrinsics, so that the compiler cannot fuse it
// differently in different places.
struct StateMerge {
  float max, sum, a, b;

  __device__ __forceinline__ StateMerge(float max_a, float sum_a, float max_b, float sum_b, float unit) {
    max = fmaxf(max_a, max_b);
    const float base = Base(max);
    a = Weight(max_a, base, unit);
    b = Weight(max_b, base, unit);
    sum = __fmaf_rn(sum_a, a, __fmul_rn(sum_b, b));
  }
  __device__ __forceinline__ float operator()(float value_a, float value_b) const {
    return __fmaf_rn(value_a, a, __fmul_rn(value_b, b));
  }
};

// The factor of a finished row's values, and the row's log-sum-exp.
struct Normalization {
  float factor, lse;

  __device__ __forceinline__ Normalization(const AttentionParams& p, int q_head, float max, float sum) {
    factor = 1.0f;
    max = __fmul_rn(max, StateScale(p));
    if (p.options.sinks != nullptr) {
      const float sink = p.options.sinks[q_head];
      const float top = fmaxf(max, sink), base = Base(top);
      factor = Weight(max, base, kLog2E);
      sum = fmaf(sum, factor, Weight(sink, base, kLog2E));
      max = top;
    }
    factor = factor / sum;
    // If a score overflows, the row's values are NaN and its lse is infinite, as in the reference implementation.
    lse = max == -NegativeInfinity() ? max : Base(max) + log2f(sum) * kLn2;
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_SOFTMAX_CUH_
