// Converts quantized elements, without their scale, to pairs of 16-bit floats for tensor cores. Exact: both types have
// enough mantissa bits. Bits are moved into place, and one multiplication or subtraction corrects the offset. This
// takes about two instructions per element and works the same on every architecture.
#ifndef KVPAGE_KERNELS_CUDA_DEQUANTIZE_CUH_
#define KVPAGE_KERNELS_CUDA_DEQUANTIZE_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/ptx.cuh"

namespace kvpage::cuda {

// The 16 bits, repeated twice.
__host__ __device__ constexpr std::uint32_t Twice(std::uint32_t bits) { return bits << 16 | bits; }

__device__ __forceinline__ std::uint32_t AndOr(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return Logic<(0xf0 & 0xcc) | 0xaa>(a, b, c);
}
__device__ __forceinline__ std::uint32_t AndXor(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return Logic<(0xf0 & 0xcc) ^ 0xaa>(a, b, c);
}

// Elements 0 and 2, and elements 1 and 3, of the four in `bytes`.
template <class S, class T>
struct Dequantize;

// |x| <= 128 fits the 8-bit significand of a bfloat16, but not below a fixed leading bit. The low 7 bits and the sign
// bit give 128 + low and 128 + sign; their difference is low - sign.
template <>
struct Dequantize<Int8, Bf16> {
  __device__ static __forceinline__ std::uint32_t Pair(std::uint32_t x) {
    constexpr std::uint32_t k128 = Twice(0x4300), kMinusOne = Twice(0xbf80);
    return MultiplyAddPair<Bf16>(AndOr(x, Twice(0x80), k128), kMinusOne, AndOr(x, Twice(0x7f), k128));
  }
  __device__ static __forceinline__ std::uint32_t Even(std::uint32_t bytes) { return Pair(bytes); }
  __device__ static __forceinline__ std::uint32_t Odd(std::uint32_t bytes) { return Pair(bytes >> 8); }
};

// 1024 + (x + 128), whose last place is 1.
template <>
struct Dequantize<Int8, F16> {
  __device__ static __forceinline__ std::uint32_t Pair(std::uint32_t x) {
    constexpr std::uint32_t kOne = Twice(0x3c00), kMinus1152 = Twice(0xe480);
    return MultiplyAddPair<F16>(AndXor(x, Twice(0xff), Twice(0x6480)), kOne, kMinus1152);
  }
  __device__ static __forceinline__ std::uint32_t Even(std::uint32_t bytes) { return Pair(bytes); }
  __device__ static __forceinline__ std::uint32_t Odd(std::uint32_t bytes) { return Pair(bytes >> 8); }
};

// Exponent and mantissa are moved to their place in T, whose exponent bias is larger. Subnormals are converted
// correctly, and the NaN code becomes 480, as in ToFloat(Float8).
template <class T>
struct Dequantize<Float8, T> {
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  // `x`: two bytes, sign-extended.
  __device__ static __forceinline__ std::uint32_t Pair(std::uint32_t x) {
    constexpr int kShift = kBf16 ? 4 : 7;
    constexpr std::uint32_t kMask = Twice(0x8000 | 0x7f << kShift);
    constexpr std::uint32_t kFactor = Twice(kBf16 ? 0x7b80 : 0x5c00);  // 2^120, 2^8
    constexpr std::uint32_t kMinusZero = Twice(0x8000);
    return MultiplyAddPair<T>(x << kShift & kMask, kFactor, kMinusZero);
  }
  __device__ static __forceinline__ std::uint32_t Even(std::uint32_t bytes) { return Pair(Permute(bytes, 0xa280)); }
  __device__ static __forceinline__ std::uint32_t Odd(std::uint32_t bytes) { return Pair(Permute(bytes, 0xb391)); }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DEQUANTIZE_CUH_
