// exp2, tanh and log in float32, accurate to about one unit in the last place. NaN gives NaN.
#ifndef KVPAGE_KERNELS_CPU_ISA_MATH_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_MATH_INL_H_

#include <cstdint>

#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

constexpr float kLog2E = 1.44269504088896341f;

// For x < 128; exactly 0 below -126, where the result would be subnormal. The polynomial is accurate to 8e-8 (its
// constant term is 1, so that 2^0 is exact), the result to little more than one unit in the last place.
KVPAGE_INLINE VF Exp2(VF x) {
  const VF f = FractionOf(x);
  VF p = Splat(1.867130070e-3f);
  p = Fma(p, f, Splat(9.017030321e-3f));
  p = Fma(p, f, Splat(5.579991310e-2f));
  p = Fma(p, f, Splat(2.401644502e-1f));
  p = Fma(p, f, Splat(6.931513118e-1f));
  p = Fma(p, f, Splat(1.0f));
  return TimesExp2OfFloor(p, x);
}

KVPAGE_INLINE float Exp2(float x) { return Exp2(Splat(x))[0]; }

KVPAGE_INLINE VF Tanh(VF x) {
  const VI sign = (VI)x & INT32_MIN;
  const VF a = (VF)((VI)x & INT32_MAX);
  const VF z = x * x;
  VF p = Splat(-5.70498872745e-3f);
  p = Fma(p, z, Splat(2.06390887954e-2f));
  p = Fma(p, z, Splat(-5.37397155531e-2f));
  p = Fma(p, z, Splat(1.33314422036e-1f));
  p = Fma(p, z, Splat(-3.33332819422e-1f));
  p = Fma(p * z, x, x);
  const VF bounded = a > 10.0f ? Splat(10.0f) : a;
  const VF big = 1.0f - 2.0f / (Exp2(bounded * (2.0f * kLog2E)) + 1.0f);
  return a < 0.625f ? p : (VF)((VI)big | sign);
}

KVPAGE_INLINE float Log(float x) { return __builtin_logf(x); }

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_MATH_INL_H_
