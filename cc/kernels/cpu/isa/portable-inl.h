// Vector primitives that sets without instructions for them share.
#ifndef KVPAGE_KERNELS_CPU_ISA_PORTABLE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_PORTABLE_INL_H_

#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector_types-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

KVPAGE_INLINE float MaxOf(VF v) {
  float m = v[0];
  KVPAGE_UNROLL for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

KVPAGE_INLINE float SumOf(VF v) {
  float s[W];
  StoreFloats(s, v);
  KVPAGE_UNROLL for (int h = W / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) s[i] += s[i + h];
  }
  return s[0];
}

// Exp2's steps. The first gives x, no less than kLeastExponent, minus the integer below it; the second multiplies p by
// 2 to that integer, and gives 0 where x is less.
constexpr float kLeastExponent = -126.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits

KVPAGE_INLINE VF AtLeastExponent(VF x) {
  const VF least = Splat(kLeastExponent);
  return x < least ? least : x;
}
KVPAGE_INLINE VF FloorPlusMagic(VF x) { return (AtLeastExponent(x) - 0.5f) + Splat(kMagic); }
KVPAGE_INLINE VF FractionOf(VF x) { return AtLeastExponent(x) - (FloorPlusMagic(x) - Splat(kMagic)); }
KVPAGE_INLINE VF TimesExp2OfFloor(VF p, VF x) {
  // A product: NaN stays NaN regardless of its bits.
  return x < Splat(kLeastExponent) ? VF{} : p * (VF)(((VI)FloorPlusMagic(x) << 23) + (127 << 23));
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_PORTABLE_INL_H_
