// Exact weights with bfloat16 products: the residuals that are left when softmax weights are rounded to bfloat16 are
// multiplied, too.
//
// Products of bfloat16 pairs are twice as fast as float products, but rounding weights to 8 bits costs about as much
// precision as rounding the result does. So the residual of every weight is multiplied as well. The leading 7 bits of
// residuals and values are enough for that, and a dot product of bytes handles four tokens at a time, in half the time
// of pairs.
//
// The residuals of a row share a unit, and so do the values of a token, by which the residuals are multiplied
// beforehand. A result depends only on what its row sees.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_RESIDUALS_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_RESIDUALS_INL_H_

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/avx512_bf16/bytes-inl.h"
#include "kernels/cpu/isa/avx512_bf16/pairs-inl.h"
#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/math-inl.h"
#include "kernels/cpu/isa/product-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

constexpr float kMostByte = 127.0f;
// The largest exponent of a value's unit.
constexpr float kMostExponent = 254 - 126 - 7;
// Smaller residuals are dropped, because their factor could overflow.
constexpr float kLeastResidual = 0x1p-118f;

// Added to values as bytes to make them unsigned.
constexpr std::int32_t kByteBias = 128;

// The values of a tile as bytes, for products with residuals.
struct TileResiduals {
  std::int32_t* words = nullptr;  // [padded_dim / kPanel][kPrefillTokens / 4, kPanel], a word: a column of four tokens
  // [kPrefillTokens]. A unit is a power of two with this exponent, or 0 with exponent -inf. After the last token, up to
  // the end of its panel, units are 0.
  float* units = nullptr;
  float* exponents = nullptr;
  std::int8_t* residuals = nullptr;  // buffer for the residuals of a block
};

// The residuals of the rows of a block.
struct BlockResiduals {
  const float* value_units;  // starting at the block's first token
  const float* value_exponents;
  std::int8_t* bytes;              // [kRowBlock, kPrefillTokens]
  float factors[kRowBlock];        // byte = residual * (its value's unit) * factor
  float units[kRowBlock];          // residual * (its value's unit) = byte * unit
  std::int32_t starts[kRowBlock];  // initial value of a sum of products, which removes the bias
};

// The largest product of a weight of row r and a value's unit is 2^(heaviest - top), where `top` is the row's largest
// score in base 2. Rounding removes at most 1/256 of a weight. A large score takes bits from the exponent that was
// added to it; the slack makes up for this, so that no byte wraps. From 2^24 on scores are integers, so weights are
// powers of two and leave no residuals.
KVPAGE_INLINE void ScaleResiduals(BlockResiduals* residuals, int r, float heaviest, float top) {
  const float slack = __builtin_fabsf(top) * 0x1p-22f;
  const float largest = heaviest - top + slack;
  // Weights are at most 1, so products are at most the largest unit. Keeps Exp2 in its range; NaN is preserved.
  const float most = Exp2((largest > kMostExponent ? kMostExponent : largest) - 8.0f);
  const bool any = most > kLeastResidual;  // false for NaN
  residuals->factors[r] = any ? kMostByte / most : 0.0f;
  residuals->units[r] = any ? most / kMostByte : 0.0f;
}

// The residuals of a block whose first token is `from`; Softmax fills them in.
KVPAGE_INLINE BlockResiduals ResidualsFrom(const TileResiduals& tile, int from) {
  BlockResiduals residuals = {};
  residuals.value_units = tile.units + from;
  residuals.value_exponents = tile.exponents + from;
  residuals.bytes = tile.residuals;
  return residuals;
}

// PickBytes index that takes the last byte of each word of a, then of b.
constexpr Bytes LastBytes() {
  Bytes index = {};
  for (int i = 0; i < 2 * W; ++i) index.byte[i] = static_cast<std::uint8_t>(4 * i);
  return index;
}
constexpr Bytes kLastBytes = LastBytes();

// Computes the unit of a row of values: 0 if the row is not finite or all its values are nearly 0, in which case only
// the rounded weights are used.
KVPAGE_INLINE void SetUnit(const char* row, int padded_dim, int head_dim, float* unit, float* exponent) {
  VI top = {};
  for (int d = 0; d < padded_dim; d += W) top = MaxMagnitude(top, (VI)LoadFirst<BF16>(row + d * 2, head_dim - d));
  const std::int32_t biased = MaxBits(top) >> 23;  // values are below 2^(biased - 126), and bytes below 2^7
  const bool any = biased >= 16 && biased < 255;
  const std::int32_t bits = any ? (biased - 126 - 7 + 127) << 23 : 0;
  __builtin_memcpy(unit, &bits, 4);
  *exponent = any ? static_cast<float>(biased - 126 - 7) : -kInfinity;
}

// Packs bfloat16 values. room: kPrefillTokens * padded_dim / 2 floats.
KVPAGE_INLINE TileResiduals PackResidualValues(PairLanes, const char* const* rows, std::int64_t offset, int size,
                                               int head_dim, float* room) {
  const int padded_dim = PaddedDim(head_dim);
  float* units = room + kPrefillTokens / 4 * padded_dim;
  const TileResiduals values = {reinterpret_cast<std::int32_t*>(room), units, units + kPrefillTokens,
                                reinterpret_cast<std::int8_t*>(units + 2 * kPrefillTokens)};
  static_assert(kPrefillTokens / 4 * 32 >= 2 * kPrefillTokens + kPrefillTokens / 4 * kRowBlock);
  for (int k = size; k % kPanel != 0; ++k) {
    units[k] = 0.0f;
    values.exponents[k] = -kInfinity;
  }
  for (int k = 0; k < size; k += 4) {
    const int count = size - k < 4 ? size - k : 4;
    for (int i = 0; i < count; ++i) {
      SetUnit(rows[k + i] + offset, padded_dim, head_dim, &units[k + i], &values.exponents[k + i]);
    }
    for (int d = 0; d < padded_dim; d += W) {
      VI word = {};
      for (int i = 0; i < count; ++i) {
        const VF v = LoadFirst<BF16>(rows[k + i] + offset + d * 2, head_dim - d);
        const VI byte = units[k + i] == 0.0f ? VI{} : ToIntegers(v * (1.0f / units[k + i]));
        word |= ((byte < 127 ? byte : SplatInt(127)) + kByteBias) << 8 * i;
      }
      StoreBits(values.words + d / kPanel * (kPrefillTokens / 4 * kPanel) + k / 4 * kPanel + d % kPanel, word);
    }
  }
  return values;
}

// Elements `first` .. `first` + W - 1 of `pairs` (bfloat16), as floats.
template <int first>
KVPAGE_INLINE VF HalfOfPairs(VI pairs) {
  return (VF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)((Iota() + first) << 16), (__m512i)pairs);
}

// Stores the residuals of weights p and q, which were rounded to `pairs`, for 2 W tokens starting at j. Adds the
// residuals times kByteBias to `sum`.
KVPAGE_INLINE void StoreResiduals(const BlockResiduals& residuals, int r, int j, VF p, VF q, VI pairs, __m256i* sum) {
  const float* units = residuals.value_units + j;
  const VF factor = Splat(residuals.factors[r]);
  const VI a = ToIntegers((p - HalfOfPairs<0>(pairs)) * (LoadFloats(units) * factor));
  const VI b = ToIntegers((q - HalfOfPairs<W>(pairs)) * (LoadFloats(units + W) * factor));
  const __m256i bytes = _mm512_castsi512_si256((__m512i)PickBytes(a, AsVector(kLastBytes), b));
  *sum = _mm256_dpbusd_epi32(*sum, _mm256_set1_epi8(static_cast<char>(kByteBias)), bytes);
  StoreBits(residuals.bytes + r * kPrefillTokens + j, bytes);
}

// c[R, kPanel] += residuals[R, 4 n] * words[n, kPanel].
template <int R>
KVPAGE_NOINLINE void ResidualProduct(const BlockResiduals& residuals, const std::int32_t* words, int n, float* c,
                                     int c_stride) {
  VI sum[R][2];
  KVPAGE_UNROLL for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = SplatInt(residuals.starts[i]);
  constexpr int kPointers = (R + 2) / 3;  // as in Product
  const std::int8_t* rows[kPointers];
  KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] = residuals.bytes + 3 * i * kPrefillTokens;
  for (int k = 0; k < n; ++k) {
    const VI x0 = LoadBits<VI>(words), x1 = LoadBits<VI>(words + W);
    words += kPanel;
    KVPAGE_UNROLL for (int i = 0; i < R; ++i) {
      const VI y = SplatInt(LoadBits<std::int32_t>(rows[i / 3] + i % 3 * kPrefillTokens));
      sum[i][0] = DotBytes(sum[i][0], x0, y);
      sum[i][1] = DotBytes(sum[i][1], x1, y);
    }
    KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] += 4;
  }
  KVPAGE_UNROLL for (int i = 0; i < R; ++i) {
    const VF unit = Splat(residuals.units[i]);
    float* to = c + i * c_stride;
    StoreFloats(to, Fma(_mm512_cvtepi32_ps((__m512i)sum[i][0]), unit, LoadFloats(to)));
    StoreFloats(to + W, Fma(_mm512_cvtepi32_ps((__m512i)sum[i][1]), unit, LoadFloats(to + W)));
  }
}

// Adds to acc a block's residuals times the values of `size` tokens, starting at `from`.
KVPAGE_INLINE void AddResiduals(const BlockResiduals& residuals, const TileResiduals& values, int from, int size,
                                float* acc, int padded_dim) {
  for (int d = 0; d < padded_dim; d += kPanel) {
    const std::int32_t* words = values.words + d / kPanel * (kPrefillTokens / 4 * kPanel) + from / 4 * kPanel;
    ResidualProduct<kRowBlock>(residuals, words, (size + 3) / 4, acc + d, padded_dim);
  }
}

// Weigh for row r, which also stores residuals. Returns the sum of the weights before rounding.
KVPAGE_INLINE float WeighWithResiduals(PairLanes, BlockResiduals* residuals, int r, int padded, VF base, VF unit,
                                       float* scores) {
  VF total = {};
  __m256i sum = {};
  float* to = scores;
  for (int j = 0; j < padded; j += 2 * W, to += W) {
    const VF p = Weights(scores + j, base, unit);
    const VF q = Weights(scores + j + W, base, unit);
    const auto pairs = (VI)_mm512_cvtne2ps_pbh(q, p);
    StoreBits(to, pairs);
    StoreResiduals(*residuals, r, j, p, q, pairs, &sum);
    total += p + q;
  }
  residuals->starts[r] = -_mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum));
  return SumOf(total);
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_RESIDUALS_INL_H_
