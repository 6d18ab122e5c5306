// Vector primitives shared by sets that have no instructions for them.
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

// Steps of Exp2. FractionOf gives x minus floor(x) for x >= kLeastExponent; TimesExp2OfFloor gives p * 2^floor(x), or 0
// if x is less.
constexpr float kLeastExponent = -126.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits

KVPAGE_INLINE VF AtLeastExponent(VF x) {
  const VF least = Splat(kLeastExponent);
  return x < least ? least : x;
}
KVPAGE_INLINE VF FloorPlusMagic(VF x) { return (AtLeastExponent(x) - 0.5f) + Splat(kMagic); }
KVPAGE_INLINE VF FractionOf(VF x) { return AtLeastExponent(x) - (FloorPlusMagic(x) - Splat(kMagic)); }
KVPAGE_INLINE VF TimesExp2OfFloor(VF p, VF x) {
  // Multiplies instead of adding to the exponent bits, so that every NaN remains a NaN.
  return x < Splat(kLeastExponent) ? VF{} : p * (VF)(((VI)FloorPlusMagic(x) << 23) + (127 << 23));
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_PORTABLE_INL_H_
