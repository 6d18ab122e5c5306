// Vector primitives for AVX2, FMA and F16C.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX2_VECTOR_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX2_VECTOR_INL_H_

#include <immintrin.h>

#include "kernels/cpu/isa/avx2/target-inl.h"
#include "kernels/cpu/isa/portable-inl.h"  // IWYU pragma: export
#include "kernels/cpu/isa/vector_types-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// a * b + c
KVPAGE_INLINE VF Fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }

// Elementwise maximum; b if either is NaN.
KVPAGE_INLINE VF Max(VF a, VF b) { return _mm256_max_ps(a, b); }

// Lane j of the result is the sum of the lanes of a[j], added in the same order for every j.
KVPAGE_INLINE VF SumEach(const VF (&a)[W]) {
  VF b[4], c[2];
  KVPAGE_UNROLL for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  KVPAGE_UNROLL for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(b[2 * i]), y = _mm256_castps_pd(b[2 * i + 1]);
    c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
}

KVPAGE_INLINE VF ZipLow(VF a, VF b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
KVPAGE_INLINE VF ZipHigh(VF a, VF b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }

// Uses intrinsics because GCC compiles __builtin_convertvector to several instructions here.
KVPAGE_INLINE VI Widen(VH h) { return (VI)_mm256_cvtepu16_epi32((__m128i)h); }
KVPAGE_INLINE VF LoadAs(I8, const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

KVPAGE_INLINE VF LoadAs(F16, const void* p) { return _mm256_cvtph_ps(LoadBits<__m128i>(p)); }
KVPAGE_INLINE void StoreAs(F16, void* p, VF v) { StoreBits(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// Loads elements divided by ElementUnit: their bits are those of a float16 with a 3-bit mantissa and an exponent that
// is 8 too low. The NaN code needs no special handling, because rows that are not finite have NaN as their scale.
KVPAGE_INLINE VF LoadAs(F8E4M3, const void* p) {
  const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p))), 7);
  return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(static_cast<short>(0xbfff))));
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX2_VECTOR_INL_H_
