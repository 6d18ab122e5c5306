// Infinities and NaN in values.
//
// A weight of 0 times such a value is NaN. So if the rows of a tile see different tokens, these values are removed from
// the product, and the rows that do see them get their infinity or NaN from a second product over marks.
#ifndef KVPAGE_KERNELS_CUDA_NONFINITE_CUH_
#define KVPAGE_KERNELS_CUDA_NONFINITE_CUH_

#include <cstdint>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/softmax.cuh"

namespace kvpage::cuda {

template <class T>
inline constexpr std::uint32_t kInfinityBits = 0;
template <>
inline constexpr std::uint32_t kInfinityBits<Bf16> = 0x7f80;
template <>
inline constexpr std::uint32_t kInfinityBits<F16> = 0x7c00;
template <class T>
inline constexpr std::uint32_t kOneBits = 0;
template <>
inline constexpr std::uint32_t kOneBits<Bf16> = 0x3f80;
template <>
inline constexpr std::uint32_t kOneBits<F16> = 0x3c00;

// The sign bits of those of the two elements that are infinite or NaN.
template <class T>
__device__ __forceinline__ std::uint32_t NonFinite(std::uint32_t pair) {
  constexpr std::uint32_t kStep = 0x8000 - kInfinityBits<T>;
  return ((pair & 0x7fff7fffu) + (kStep << 16 | kStep)) & 0x80008000u;
}

// Two elements, with infinities and NaN replaced by 0.
template <class T>
__device__ __forceinline__ std::uint32_t KeepFinite(std::uint32_t pair) {
  return pair & ~((NonFinite<T>(pair) >> 15) * 0xffffu);
}

// 1 if the element is NaN or the infinity of this sign, else 0.
template <class T, bool kNegative>
__device__ __forceinline__ std::uint32_t Marks(std::uint32_t pair) {
  std::uint32_t marks = 0;
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    const std::uint32_t bits = pair >> shift & 0xffff, size = bits & 0x7fff;
    if (size > kInfinityBits<T> || (size == kInfinityBits<T> && (bits >> 15 != 0) == kNegative)) {
      marks |= kOneBits<T> << shift;
    }
  }
  return marks;
}

// Whether a tile holds such values. All threads must call it.
template <class T, int kDim, int kTokens>
__device__ __forceinline__ bool AnyNonFinite(const unsigned char* tile) {
  std::uint32_t found = 0;
  for (int i = threadIdx.x; i < kTokens * kDim / 8; i += kThreads) {
    const uint4 units = *reinterpret_cast<const uint4*>(tile + i * 16);
    found |= NonFinite<T>(units.x) | NonFinite<T>(units.y) | NonFinite<T>(units.z) | NonFinite<T>(units.w);
  }
  return __syncthreads_or(found != 0) != 0;
}

// Sums of marks for two fragments of 8 columns: positive where a visible value is NaN or the infinity of this sign.
struct MarkSums {
  float plus[2][4] = {}, minus[2][4] = {};
};

// Adds weights times values of 16 tokens to the two fragments at `sums`, leaving out values that are not finite, which
// are added to the marks instead. `weights` is the left operand; `values` are the right operands for both fragments.
template <class T>
__device__ __forceinline__ void AddGuarded(float (*sums)[4], MarkSums& marks, const std::uint32_t (&weights)[4],
                                           const std::uint32_t (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    MultiplyAdd<T>(sums[i], weights, KeepFinite<T>(values[2 * i]), KeepFinite<T>(values[2 * i + 1]));
    MultiplyAdd<T>(marks.plus[i], weights, Marks<T, false>(values[2 * i]), Marks<T, false>(values[2 * i + 1]));
    MultiplyAdd<T>(marks.minus[i], weights, Marks<T, true>(values[2 * i]), Marks<T, true>(values[2 * i + 1]));
  }
}

// Adds the infinities of all marked values to the sums.
__device__ __forceinline__ void AddInfinities(float (*sums)[4], const MarkSums& marks) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (marks.plus[i / 4][i % 4] > 0.0f) sums[i / 4][i % 4] -= NegativeInfinity();
    if (marks.minus[i / 4][i % 4] > 0.0f) sums[i / 4][i % 4] += NegativeInfinity();
  }
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_NONFINITE_CUH_
