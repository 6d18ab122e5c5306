// Vector primitives for AVX-512.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_VECTOR_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_VECTOR_INL_H_

#include <immintrin.h>

#include "kernels/cpu/isa/avx512/target-inl.h"
#include "kernels/cpu/isa/vector_types-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// a * b + c
KVPAGE_INLINE VF Fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }

// Elementwise maximum; b if either is NaN.
KVPAGE_INLINE VF Max(VF a, VF b) { return _mm512_max_ps(a, b); }

KVPAGE_INLINE float MaxOf(VF v) { return _mm512_reduce_max_ps(v); }
KVPAGE_INLINE float SumOf(VF v) { return _mm512_reduce_add_ps(v); }

// Lane j of the result is the sum of the lanes of a[j], added in the same order for every j.
KVPAGE_INLINE VF SumEach(const VF (&a)[W]) {
  VF b[8], c[4], d[2];
  KVPAGE_UNROLL for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  KVPAGE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  KVPAGE_UNROLL for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}

KVPAGE_INLINE VF ZipLow(VF a, VF b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
KVPAGE_INLINE VF ZipHigh(VF a, VF b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Steps of Exp2: x minus floor(x), and p * 2^floor(x), which is 0 if x < -126.
KVPAGE_INLINE VF FractionOf(VF x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
KVPAGE_INLINE VF TimesExp2OfFloor(VF p, VF x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, Splat(-126.0f), _CMP_NLT_UQ), p, x);
}

// Uses intrinsics because GCC compiles __builtin_convertvector to several instructions here.
KVPAGE_INLINE VI Widen(VH h) { return (VI)_mm512_cvtepu16_epi32((__m256i)h); }
KVPAGE_INLINE VF LoadAs(I8, const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(LoadBits<__m128i>(p))); }

KVPAGE_INLINE VF LoadAs(F16, const void* p) { return _mm512_cvtph_ps(LoadBits<__m256i>(p)); }
KVPAGE_INLINE void StoreAs(F16, void* p, VF v) { StoreBits(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// Loads elements divided by ElementUnit: their bits are those of a float16 with a 3-bit mantissa and an exponent that
// is 8 too low. The NaN code needs no special handling, because rows that are not finite have NaN as their scale.
KVPAGE_INLINE VF LoadAs(F8E4M3, const void* p) {
  const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(LoadBits<__m128i>(p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff))));
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_VECTOR_INL_H_
