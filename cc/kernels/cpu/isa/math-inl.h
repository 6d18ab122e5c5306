// exp and tanh in float32, about one unit in the last place. NaN goes in and comes out.

constexpr float kInfinity = __builtin_inff();

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// For x < 128; exactly 0 below -126, where the result would be subnormal. The polynomial is good to 8e-8 (its constant
// term is 1, so that 2^0 is), the result to little more than one unit in the last place.
KVPAGE_INLINE VF Exp2(VF x) {
#if KVPAGE_LANES == 16
  const VF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x minus the integer below it
#else
  const VF floor = Splat(-126.0f);
  const VF magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const VF clamped = x < floor ? floor : x;
  const VF shifted = (clamped - 0.5f) + magic;
  const VF f = clamped - (shifted - magic);
#endif
  VF p = Splat(1.867130070e-3f);
  p = Fma(p, f, Splat(9.017030321e-3f));
  p = Fma(p, f, Splat(5.579991310e-2f));
  p = Fma(p, f, Splat(2.401644502e-1f));
  p = Fma(p, f, Splat(6.931513118e-1f));
  p = Fma(p, f, Splat(1.0f));
#if KVPAGE_LANES == 16
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, Splat(-126.0f), _CMP_NLT_UQ), p, x);
#else
  // A product: NaN stays NaN whatever its bits are.
  return x < floor ? VF{} : p * (VF)(((VI)shifted << 23) + (127 << 23));
#endif
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
