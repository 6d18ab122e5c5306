// Elements of every storage type in device code: conversions from and to float32, and vectors.
#ifndef KVPAGE_KERNELS_CUDA_ELEMENTS_CUH_
#define KVPAGE_KERNELS_CUDA_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cuda/device.cuh"

namespace kvpage::cuda {

// Quantized elements, without their scale. The 8-bit float has 4 exponent bits and 3 mantissa bits; the NaN code is
// never stored.
struct Int8 {
  std::int8_t value;
};
struct Float8 {
  std::uint8_t bits;
};

template <class T>
inline constexpr bool kIsQuantized = false;
template <>
inline constexpr bool kIsQuantized<Int8> = true;
template <>
inline constexpr bool kIsQuantized<Float8> = true;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(Int8 x) { return static_cast<float>(x.value); }
// Converted as float16, whose exponent bias is larger by 8.
__device__ __forceinline__ float ToFloat(Float8 x) {
  const unsigned bits = x.bits;
  const auto half = static_cast<unsigned short>((bits & 0x80u) << 8 | (bits & 0x7fu) << 7);
  return __half2float(__ushort_as_half(half)) * 256.0f;
}

// Rounds to nearest even.
template <class T>
__device__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}

// The output value of failed ops.
template <class T>
__device__ __forceinline__ T NaN() {
  return FromFloat<T>(__int_as_float(0x7fc00000));
}

// N elements that are loaded and stored in one access of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T at[N];
};

// The number of elements of T in 16 bytes.
template <class T>
inline constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
__device__ __forceinline__ Vector<T, N> LoadVector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void StoreVector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// Calls fn(T{}) with the element type of a dtype.
template <class Fn>
Status ForFloat(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(float{});
    case DType::kBF16:
      return fn(__nv_bfloat16{});
    case DType::kF16:
      return fn(__half{});
    case DType::kI8:
    case DType::kF8E4M3:
      break;
  }
  return InvalidArgument(std::string(Name(dtype)) + " is a storage type only: wanted float32, bfloat16 or float16");
}
template <class Fn>
Status ForStorage(DType dtype, Fn&& fn) {
  if (dtype == DType::kI8) return fn(Int8{});
  if (dtype == DType::kF8E4M3) return fn(Float8{});
  return ForFloat(dtype, fn);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_ELEMENTS_CUH_
