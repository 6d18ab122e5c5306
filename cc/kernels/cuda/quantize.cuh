// Quantized storage: rows of head_dim elements that share a scale, as defined in jax_kvpage/quantize.py.
#ifndef KVPAGE_KERNELS_CUDA_QUANTIZE_CUH_
#define KVPAGE_KERNELS_CUDA_QUANTIZE_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/elements.cuh"

namespace kvpage::cuda {

// Float bits without their sign are ordered like the magnitudes of the floats, with infinity and NaN on top.
__device__ __forceinline__ unsigned Magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <class To>
inline constexpr float kLargest = std::is_same_v<To, Int8> ? 127.0f : 448.0f;

// The element's bits. |v| exceeds the largest value only by rounding errors.
template <class To>
__device__ __forceinline__ unsigned Quantize(float v) {
  if constexpr (std::is_same_v<To, Int8>) return static_cast<unsigned>(__float2int_rn(v)) & 0xffu;
  const unsigned bits = Magnitude(v);
  const unsigned normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  // Below 2^-6, elements are multiples of 2^-9, the last place of 2^14.
  const unsigned small = __float_as_uint(__fadd_rn(__uint_as_float(bits), 16384.0f)) & 0xffu;
  const unsigned magnitude = bits < ((127 - 6) << 23) ? small : normal;
  return magnitude | (__float_as_uint(v) >> 24 & 0x80u);
}

// The scale of a row whose largest magnitude is `top`.
template <class To>
struct RowScale {
  float scale;
  float inverse;
  bool stored;  // false: all elements are 0

  __device__ __forceinline__ explicit RowScale(unsigned top) {
    const bool finite = top < 0x7f800000u;
    scale = __fmul_rn(__uint_as_float(top), 1.0f / kLargest<To>);
    stored = finite && scale >= 1.17549435e-38f;
    if (!stored) scale = finite ? 0.0f : __uint_as_float(0x7fc00000u);
    inverse = stored ? __frcp_rn(scale) : 0.0f;
  }
  // The bits of element x of the row.
  __device__ __forceinline__ unsigned Bits(float x) const { return stored ? Quantize<To>(__fmul_rn(x, inverse)) : 0; }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_QUANTIZE_CUH_
