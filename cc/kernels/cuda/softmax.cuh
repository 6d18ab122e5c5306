// Scores, and the merge and normalization of softmax states. All in base 2: a score is log2(e) times that of the
// natural softmax.
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

// Turns dot products into scores: scale, soft cap, ALiBi. kExact: with the library's tanh, whose relative error is
// small.
template <bool kExact>
struct ScoreRule {
  float factor;  // of a dot product; with a soft cap, gives the argument of tanh or exp2
  float cap;     // log2(e) times the soft cap; 0: none
  bool alibi;

  __device__ __forceinline__ explicit ScoreRule(const AttentionParams& p) {
    const bool capped = p.options.soft_cap > 0.0f;
    // tanh(x / cap) = 1 - 2 / (1 + e^(2 x / cap))
    factor = capped ? p.options.scale / p.options.soft_cap * (kExact ? 1.0f : 2.0f * kLog2E) : p.options.scale * kLog2E;
    cap = capped ? p.options.soft_cap * kLog2E : 0.0f;
    alibi = p.options.alibi_slopes != nullptr;
  }
  __device__ __forceinline__ bool plain() const { return cap == 0.0f && !alibi; }

  // `slope` is log2(e) times the head's; `distance` is key position - query position.
  __device__ __forceinline__ float Score(float dot, float slope, std::int32_t distance) const {
    float x = dot * factor;
    if (cap != 0.0f) x = kExact ? cap * tanhf(x) : cap - __fdividef(2.0f * cap, 1.0f + Exp2(x > 126.0f ? 126.0f : x));
    if (alibi) x = fmaf(slope, static_cast<float>(distance), x);
    return x;
  }
};

// The maximum to subtract in exponents: 0 while no score is above -inf, so that weights are 0, not 2^(-inf + inf).
__device__ __forceinline__ float Base(float max) { return max == NegativeInfinity() ? 0.0f : max; }

// The merge of two states: values * a + other values * b. Uses intrinsics, so that the compiler cannot fuse it
// differently in different places.
struct StateMerge {
  float max, sum, a, b;

  __device__ __forceinline__ StateMerge(float max_a, float sum_a, float max_b, float sum_b) {
    max = fmaxf(max_a, max_b);
    const float base = Base(max);
    a = Exp2(__fsub_rn(max_a, base));
    b = Exp2(__fsub_rn(max_b, base));
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
    if (p.options.sinks != nullptr) {
      const float sink = p.options.sinks[q_head] * kLog2E;
      const float top = fmaxf(max, sink), base = Base(top);
      factor = Exp2(max - base);
      sum = fmaf(sum, factor, Exp2(sink - base));
      max = top;
    }
    factor = factor / sum;
    lse = (Base(max) + log2f(sum)) * kLn2;
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_SOFTMAX_CUH_
