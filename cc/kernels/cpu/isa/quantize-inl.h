// Rows that share a scale, bit-identical to the definition in jax_kvpage/quantize.py:
//
//   scale = amax * (1 / largest), or 0 if that is subnormal (programs that flush subnormals would treat it as zero);
//   element = x * (1 / scale), rounded to nearest even; 0 if scale is 0;
//   a row with an infinity or a NaN has scale NaN and elements 0.
#ifndef KVPAGE_KERNELS_CPU_ISA_QUANTIZE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_QUANTIZE_INL_H_

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/convert-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

constexpr float kLargestI8 = 127.0f;  // symmetric
constexpr float kLargestF8E4M3 = 448.0f;

// Both functions remove the sign before the addition that rounds: the preceding product and the sum must not be fused
// into one operation, which would round differently.

// |v| is at most slightly above 127.
KVPAGE_INLINE void StoreAs(I8, void* p, VF v) {
  const VI sign = (VI)v >> 31;
  // Adding 2^23 leaves the rounded integer in the low bits.
  const VI magnitude = (VI)((VF)((VI)v & INT32_MAX) + 8388608.0f) & 0xff;
  StoreBits(p, __builtin_convertvector((magnitude ^ sign) - sign, VB));
}

// |v| is at most slightly above 448.
KVPAGE_INLINE void StoreAs(F8E4M3, void* p, VF v) {
  const VI bits = (VI)v & INT32_MAX;
  const VI normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3);
  // Below 2^-6, elements are multiples of 2^-9, the last place of 2^14.
  const VI small = (VI)((VF)bits + 16384.0f) & 0xff;
  const VI magnitude = bits < ((127 - 6) << 23) ? small : normal;
  StoreBits(p, __builtin_convertvector(magnitude | (((VI)v >> 24) & 0x80), VB));
}

template <class D, class S>
void QuantizeAs(char* dst, float* scale, float largest, const char* src, std::int64_t n) {
  VI top = {};
  for (std::int64_t i = 0; i < n; i += W) top = MaxMagnitude(top, (VI)LoadFirst<S>(src + i * S::kSize, n - i));
  std::int32_t amax_bits = 0;
  for (int i = 0; i < W; ++i) amax_bits = top[i] > amax_bits ? top[i] : amax_bits;
  if (amax_bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    __builtin_memset(dst, 0, n);
    return;
  }
  float amax;
  __builtin_memcpy(&amax, &amax_bits, 4);
  const float s = amax * (1.0f / largest);
  if (s < 1.17549435e-38f) {
    *scale = 0.0f;
    __builtin_memset(dst, 0, n);
    return;
  }
  *scale = s;
  const float inverse = 1.0f / s;
  std::int64_t i = 0;
  for (; i + W <= n; i += W) StoreAs(D{}, dst + i, LoadAs(S{}, src + i * S::kSize) * inverse);
  if (i < n) StoreFirst<D>(dst + i, n - i, LoadFirst<S>(src + i * S::kSize, n - i) * inverse);
}

void Quantize(void* dst, float* scale, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  WithFloatTag(src_dtype, [&](auto s) {
    using S = decltype(s);
    dst_dtype == DType::kI8 ? QuantizeAs<I8, S>(to, scale, kLargestI8, from, n)
                            : QuantizeAs<F8E4M3, S>(to, scale, kLargestF8E4M3, from, n);
  });
}

template <class S>
void DequantizeAs(float* dst, const char* src, float factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += W) {
    const VF v = LoadFirst<S>(src + i, n - i) * factor;
    if (n - i >= W) {
      StoreFloats(dst + i, v);
    } else {
      __builtin_memcpy(dst + i, &v, (n - i) * 4);
    }
  }
}

void Dequantize(float* dst, const void* src, DType src_dtype, float scale, std::int64_t n) {
  const char* from = static_cast<const char*>(src);
  const float factor = scale * ElementUnit(src_dtype);
  if (src_dtype == DType::kI8) return DequantizeAs<I8>(dst, from, factor, n);
  DequantizeAs<F8E4M3>(dst, from, factor, n);
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_QUANTIZE_INL_H_
