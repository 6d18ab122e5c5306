// Replaces CUDA's header of the same name.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_CUDA_FP16_H_
#define KVPAGE_TESTING_CUDA_EMULATION_CUDA_FP16_H_

#include "testing/cuda_emulation/cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  const auto sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  unsigned short half = 0;
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) {  // rounds to 65520 or more
    half = 0x7c00;
  } else if (size >= 0x38800000u) {  // 2^-14
    half = static_cast<unsigned short>((size + 0xfffu + (size >> 13 & 1) - (112u << 23)) >> 13);
  } else {  // multiples of 2^-24, the last place of 0.5
    half = static_cast<unsigned short>(__float_as_uint(__fadd_rn(__uint_as_float(size), 0.5f)) & 0x7ff);
  }
  return {static_cast<unsigned short>(sign | half)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
  if (size >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | size << 13);
  // The exponent biases differ by 112; the product is exact, also for subnormals.
  return __uint_as_float(sign | __float_as_uint(__fmul_rn(__uint_as_float(size << 13), 0x1p112f)));
}

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }

#endif  // KVPAGE_TESTING_CUDA_EMULATION_CUDA_FP16_H_
