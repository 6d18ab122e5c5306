// Lanes of two bfloat16 whose products are summed: used in prefill, and for the scores of decode, if queries and stored
// elements are bfloat16 or can be represented exactly in it.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PAIRS_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PAIRS_INL_H_

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/math-inl.h"
#include "kernels/cpu/isa/product-inl.h"
#include "kernels/cpu/isa/softmax-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1] over bfloat16 pairs.
KVPAGE_INLINE VF DotPairs(VF acc, VI a, VI b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// Tag of pairs of elements, which are loaded as pairs of bfloat16.
template <class T>
struct PairsOf {
  static constexpr int kSize = 2 * T::kSize;
};
KVPAGE_INLINE VF LoadAs(PairsOf<BF16>, const void* p) { return LoadBits<VF>(p); }
template <class T>
KVPAGE_INLINE VF LoadAs(PairsOf<T>, const void* p) {
  const VF first = LoadAs(T{}, p), second = LoadAs(T{}, static_cast<const char*>(p) + W * T::kSize);
  return (VF)_mm512_cvtne2ps_pbh(second, first);
}

// Stored types that bfloat16 holds exactly.
template <class T>
constexpr bool kExactInBF16 = T::kSize == 1;
template <>
constexpr bool kExactInBF16<BF16> = true;

struct TileResiduals;  // see residuals-inl.h
struct BlockResiduals;

struct PairLanes {
  static constexpr int kElements = 2;
  static constexpr bool kHasResiduals = true;
  using TileResiduals = KVPAGE_ISA::TileResiduals;
  using BlockResiduals = KVPAGE_ISA::BlockResiduals;
  template <class T>
  using Stored = PairsOf<T>;

  template <class P>
  static KVPAGE_INLINE VI Load(const void* p) {
    return (VI)LoadAs(P{}, p);
  }
  // Loads the first W bfloat16 at p, followed by zeros.
  static KVPAGE_INLINE VI LoadHalf(const void* p) { return (VI)_mm512_zextsi256_si512(LoadBits<__m256i>(p)); }
  static KVPAGE_INLINE VF MulAdd(VF sum, VI x, VI y) { return DotPairs(sum, x, y); }
  static KVPAGE_INLINE VF Check(VI x) { return FloatLanes::Check(x << 16) + FloatLanes::Check(x >> 16 << 16); }
};

// Values of two tokens; a lane holds the same column of both: dst[padded_dim / kPanel][kPrefillTokens / 2, kPanel].
template <class T>
void PackValues(PairLanes, const char* const* rows, std::int64_t offset, int size, int head_dim, float* dst) {
  static_assert(kPanel == 2 * W);
  typedef std::uint16_t Halves __attribute__((vector_size(W * 4)));
  const int padded_dim = PaddedDim(head_dim);
  for (int k = 0; k < size; k += 2) {
    for (int d = 0; d < padded_dim; d += kPanel) {
      const std::int64_t at = offset + d * T::kSize;
      const int lanes = (head_dim - d) / 2;
      const auto a = (Halves)LoadFirst<PairsOf<T>>(rows[k] + at, lanes);
      const auto b = k + 1 < size ? (Halves)LoadFirst<PairsOf<T>>(rows[k + 1] + at, lanes) : Halves{};
      float* to = dst + d * (kPrefillTokens / 2) + k / 2 * kPanel;
      StoreBits(to, __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41,
                                            10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
      StoreBits(to + W, __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
    }
  }
}

// Turns scores into weights rounded to bfloat16 pairs; returns the sum of the rounded weights.
KVPAGE_INLINE float Weigh(PairLanes, int padded, VF base, VF unit, float* scores, float* exact) {
  const VI ones = SplatInt(0x3f803f80);
  VF total = {}, rounded = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Weights(scores + j, base, unit);
    const VF q = Weights(scores + j + W, base, unit);
    const VI pairs = (VI)_mm512_cvtne2ps_pbh(q, p);
    StoreBits(to, pairs);
    total += p + q;
    rounded = DotPairs(rounded, pairs, ones);
  }
  *exact = SumOf(total);
  return SumOf(rounded);
}

KVPAGE_INLINE float WeighScaled(PairLanes, const float* scales, Visible visible, int padded, VF base, VF unit,
                                float* scores) {
  VF total = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Weights(scores + j, base, unit);
    const VF q = Weights(scores + j + W, base, unit);
    StoreBits(to, (VI)_mm512_cvtne2ps_pbh(Scaled(q, scales, visible, j + W), Scaled(p, scales, visible, j)));
    total += p + q;
  }
  return SumOf(total);
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PAIRS_INL_H_
