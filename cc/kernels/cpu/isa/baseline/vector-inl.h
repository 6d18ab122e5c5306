// Vector primitives for any machine: four lanes, compiled for the compiler's default target.
#ifndef KVPAGE_KERNELS_CPU_ISA_BASELINE_VECTOR_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_BASELINE_VECTOR_INL_H_

#include <cstdint>

#include "kernels/cpu/isa/portable-inl.h"  // IWYU pragma: export
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector_types-inl.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// a * b + c
KVPAGE_INLINE VF Fma(VF a, VF b, VF c) {
#if defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Elementwise maximum; b if either is NaN.
KVPAGE_INLINE VF Max(VF a, VF b) { return a > b ? a : b; }

// Lane j of the result is the sum of the lanes of a[j], added in the same order for every j.
KVPAGE_INLINE VF SumEach(const VF (&a)[W]) {
  const VF b0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5) + __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const VF b1 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5) + __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  return __builtin_shufflevector(b0, b1, 0, 1, 4, 5) + __builtin_shufflevector(b0, b1, 2, 3, 6, 7);
}

KVPAGE_INLINE VF ZipLow(VF a, VF b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
KVPAGE_INLINE VF ZipHigh(VF a, VF b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

KVPAGE_INLINE VI Widen(VH h) { return __builtin_convertvector(h, VI); }
KVPAGE_INLINE VF LoadAs(I8, const void* p) { return __builtin_convertvector(LoadBits<VB>(p), VF); }

// Converts the exponent with integer arithmetic: exact for subnormals, even if subnormal floats are flushed to zero.
KVPAGE_INLINE VF LoadAs(F16, const void* p) {
  const VI half = Widen(LoadBits<VH>(p));
  const VI bits = (half & 0x7fff) << 13;
  const VI exponent = bits & (0x1f << 23);
  const VI normal = bits + ((127 - 15) << 23);
  const VI special = bits + ((255 - 31) << 23);
  const VI one = SplatInt(113 << 23);
  const VI small = (VI)((VF)(bits + one) - (VF)one);
  const VI magnitude = exponent == 0 ? small : (exponent == (0x1f << 23) ? special : normal);
  return (VF)(magnitude | ((half & 0x8000) << 16));
}

KVPAGE_INLINE std::uint16_t HalfOf(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  std::uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | ((bits >> 13) & 0x3ff);  // NaN, made quiet
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds past 65504
  } else if (bits < 0x38800000) {
    // Subnormal or zero: the implicit bit joins the mantissa, which is shifted into units of 2^-24 and rounded.
    const std::uint32_t shift = 126 - (bits >> 23);
    const std::uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    if (shift > 25) {
      half = 0;
    } else {
      half = mantissa >> shift;
      const std::uint32_t rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
      half += rest > tie || (rest == tie && (half & 1));
    }
  } else {
    half = (bits - ((127 - 15) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

KVPAGE_INLINE void StoreAs(F16, void* p, VF v) {
  VH h;
  KVPAGE_UNROLL for (int i = 0; i < W; ++i) h[i] = HalfOf(v[i]);
  StoreBits(p, h);
}

// Loads elements divided by ElementUnit, with integer arithmetic on the exponent as for float16. The NaN code needs no
// special handling, because rows that are not finite have NaN as their scale.
KVPAGE_INLINE VF LoadAs(F8E4M3, const void* p) {
  const VI code = __builtin_convertvector(LoadBits<VB>(p), VI);
  const VI bits = (code & 0x7f) << 20;
  const VI normal = bits + ((127 - 15) << 23);
  const VI one = SplatInt((127 - 14) << 23);
  const VI small = (VI)((VF)(bits + one) - (VF)one);
  return (VF)(((code & 0x78) == 0 ? small : normal) | (code & INT32_MIN));
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_BASELINE_VECTOR_INL_H_
