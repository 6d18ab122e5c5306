// Prepares queries and weights as operands for products with quantized keys and values.
//
// int8: query rows and weights become 3-byte integers, whose sums over bytes are exact, so they are as precise as
// float32, to 2^-23 of the largest element. The last byte of bfloat16 queries is 0 except for elements below 1/128 of
// the largest, and zero bytes are skipped. For weights, 2 bytes are enough if results are rounded to bfloat16.
// float8_e4m3fn: bfloat16 queries are used unchanged, and weights are rounded to bfloat16. This rounding changes an
// output by 0.1% of its size, while rounding the values to 4 bits has already changed it by percents.
//
// L is the number of bytes of a weight, 0 for float8.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_OPERANDS_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_OPERANDS_INL_H_

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/isa/avx512_bf16/bytes-inl.h"
#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/softmax-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// The number of 32-bit words that hold four elements of a query, or four weights: bytes of integers (last byte first),
// or pairs of bfloat16.
template <bool kInts>
constexpr int kQueryParts = kInts ? 3 : 2;
template <int L>
constexpr int kWeightParts = L > 0 ? L : 2;

// The query rows of a KV head, used for a whole span. Rows are processed R at a time. The words of the group that
// starts at row r are at r * kQueryParts * line / 4, laid out as [line / 4][R][kQueryParts].
struct QuantizedQuery {
  std::int32_t* words;
  std::int32_t* start;     // int8: [rows][kQueryParts], initial value of a sum of products
  float* unit;             // int8: [rows]
  std::int8_t* last_byte;  // int8: [line / 4] at r * line / 4, whether the last byte of any of these words is not 0
};

constexpr int PaddedLine(int head_dim) { return (head_dim + 63) / 64 * 64; }

template <bool kInts>
KVPAGE_INLINE QuantizedQuery OfHead(const QuantizedQuery& q, int head, int rows, int head_dim) {
  const std::int64_t row = std::int64_t{head} * rows;
  const int words = PaddedLine(head_dim) / 4;
  return {q.words + row * kQueryParts<kInts> * words, q.start + row * kQueryParts<kInts>, q.unit + row,
          q.last_byte + row * words};
}

// Numbers of magnitude at most amax (given as bits) become integers of at most `most` when multiplied by `lift` and
// then by `factor` (a single step could overflow). The unit of these integers is a power of two, so that numbers with
// few bits keep them all. NaN if amax is not finite.
struct IntegerScale {
  float lift;
  float factor;
  float unit;
};
KVPAGE_INLINE IntegerScale ScaleToIntegers(std::int32_t amax_bits, int bits, float most) {
  if (amax_bits >= 0x7f800000) return {0.0f, 0.0f, __builtin_nanf("")};
  if (amax_bits < 0x00800000) return {0.0f, 0.0f, 0.0f};  // subnormal: treated as zero, as in programs that flush them
  int exponent = (amax_bits >> 23) - 127 + 1 - bits;      // amax is below 2^(bits + exponent)
  float amax;
  __builtin_memcpy(&amax, &amax_bits, 4);
  const auto power = [](int e) {
    const std::int32_t power_bits = (e + 127) << 23;
    float value;
    __builtin_memcpy(&value, &power_bits, 4);
    return value;
  };
  const int lift = exponent < -60 ? 64 : 0;
  if (amax * power(lift) * power(-exponent - lift) > most) ++exponent;
  return {power(lift), power(-exponent - lift), exponent < -126 ? power(exponent + 64) * 0x1p-64f : power(exponent)};
}
// The largest integers of 3 signed bytes, and of L unsigned bytes.
constexpr float kMostSigned = 8355711.0f;
template <int L>
constexpr float kMostUnsigned = L == 2 ? 65535.0f : 16777215.0f;

// Writes the operands for rows r .. r + R - 1 of a head's queries.
template <int R, bool kInts>
void QuantizeQueries(const float* q, const float* q16, int r, int padded_dim, int line,
                     const QuantizedQuery& quantized) {
  constexpr int P = kQueryParts<kInts>;
  std::int32_t* words = quantized.words + r * P * line / 4;
  std::int8_t* last_byte = quantized.last_byte + r * line / 4;
  for (int w = 0; kInts && w < line / 4; ++w) last_byte[w] = 0;
  for (int i = 0; i < R; ++i) {
    const auto put = [&](int d, int part, std::int32_t word) {
      words[(d / 4 * R + i) * P + part] = word;
      if (kInts && part == 0 && word != 0) last_byte[d / 4] = 1;
    };
    if constexpr (!kInts) {
      const float* pairs = q16 + (r + i) * padded_dim / 2;
      for (int d = 0; d < line; d += 2) {
        put(d, d / 2 % 2, d < padded_dim ? LoadBits<std::int32_t>(pairs + d / 2) : 0);
      }
      continue;
    }
    const float* row = q + (r + i) * padded_dim;
    VI top = {};
    for (int d = 0; d < padded_dim; d += W) top = MaxMagnitude(top, LoadBits<VI>(row + d));
    const IntegerScale scale = ScaleToIntegers(MaxBits(top), 23, kMostSigned);
    quantized.unit[r + i] = scale.unit;
    VI sum[P] = {};
    for (int d = 0; d < line; d += W) {
      VI remainder = {};
      if (d < padded_dim && scale.factor > 0.0f)
        remainder = ToIntegers(LoadFloats(row + d) * scale.lift * scale.factor);
      for (int part = 0; part < P; ++part) {
        const VI byte = remainder << 24 >> 24;
        remainder = (remainder - byte) >> 8;
        sum[part] += byte;
        std::int32_t four[W / 4];
        StoreBits(four, __builtin_convertvector(byte, VB));
        for (int k = 0; k < W / 4; ++k) put(d + 4 * k, part, four[k]);
      }
    }
    // Keys are multiplied as unsigned bytes, which are 128 larger than their value.
    for (int part = 0; part < P; ++part) {
      quantized.start[(r + i) * P + part] = -128 * _mm512_reduce_add_epi32((__m512i)sum[part]);
    }
  }
}

// Computes the factors that turn the weights of a row into integers of L bytes; if L is 0, just the scales of the
// visible tokens. Returns the unit of the products, NaN if one of these scales is not finite. Tokens that the row does
// not see are ignored: not even the last bit of the result may depend on them.
template <int L>
KVPAGE_INLINE float ValueScales(const float* scales, Visible visible, int size, float* factors) {
  VI top = {};
  for (int j = 0; j < size; j += W) {
    const VI index = Iota() + j;
    const VI seen = ((index >= visible.from) & (index < visible.to)) ? LoadBits<VI>(scales + j) : VI{};
    StoreBits(factors + j, seen);
    top = MaxMagnitude(top, seen);
  }
  const std::int32_t amax_bits = MaxBits(top);
  if (L == 0) return amax_bits < 0x7f800000 ? 1.0f : __builtin_nanf("");
  const IntegerScale scale = ScaleToIntegers(amax_bits, 8 * L, kMostUnsigned<L>);
  for (int j = 0; j < size; j += W) StoreFloats(factors + j, LoadFloats(factors + j) * scale.lift * scale.factor);
  return scale.unit;
}

// Computes a row's weights times `scales` as the operands of QuantizedValues: words[part][16], where word g is for
// tokens g, length + g, ... of the tile. int8: one byte of each. float8: one pair of bfloat16 for the first two tokens
// and one for the other two.
template <int L>
KVPAGE_INLINE void QuantizeWeights(const float* weights, const float* scales, int length, VI* words) {
  VF w[4];
  KVPAGE_UNROLL for (int s = 0; s < 4; ++s) {
    w[s] = LoadFloats(weights + s * length) * LoadFloats(scales + s * length);
  }
  if constexpr (L > 0) {
    VI n[4];
    // Weights are at most 1, but Exp2 may round up.
    KVPAGE_UNROLL for (int s = 0; s < 4; ++s) n[s] = ToIntegers(_mm512_min_ps(w[s], Splat(kMostUnsigned<L>)));
    KVPAGE_UNROLL for (int l = 0; l < L; ++l) {
      words[l] = (n[0] >> (8 * l) & 0xff) | (n[1] >> (8 * l) & 0xff) << 8 | (n[2] >> (8 * l) & 0xff) << 16 |
                 n[3] >> (8 * l) << 24;
    }
  } else {
    // _mm512_cvtne2ps_pbh would order the pairs differently.
    VI n[4];
    KVPAGE_UNROLL for (int s = 0; s < 4; ++s) n[s] = RoundToUpperHalf(w[s]);
    KVPAGE_UNROLL for (int part = 0; part < 2; ++part) {
      words[part] = (n[2 * part + 1] & static_cast<std::int32_t>(0xffff0000u)) | (n[2 * part] >> 16 & 0xffff);
    }
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_OPERANDS_INL_H_
