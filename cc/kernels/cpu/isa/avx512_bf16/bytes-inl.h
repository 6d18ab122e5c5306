// Stored 8-bit elements ("codes") as operands of instructions that multiply several at once: int8 in dot products of
// four bytes, float8_e4m3fn in pairs of bfloat16, which represent them exactly.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_BYTES_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_BYTES_INL_H_

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// acc[i] += the dot product of four unsigned bytes of a and four signed bytes of b, without saturation.
KVPAGE_INLINE VI DotBytes(VI acc, VI a, VI b) { return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }

KVPAGE_INLINE std::int32_t MaxBits(VI v) { return _mm512_reduce_max_epi32((__m512i)v); }
// Rounds to nearest even. NaN becomes INT32_MIN.
KVPAGE_INLINE VI ToIntegers(VF v) { return (VI)_mm512_cvtps_epi32(v); }

// Broadcasts two words to all pairs of lanes.
KVPAGE_INLINE VI SplatPairs(const std::int32_t* words) { return (VI)_mm512_set1_epi64(LoadBits<std::int64_t>(words)); }

// out[i] = (a, b)[index[i]].
KVPAGE_INLINE VI PickBytes(VI a, VI index, VI b) {
  return (VI)_mm512_permutex2var_epi8((__m512i)a, (__m512i)index, (__m512i)b);
}

// Loads the first n bytes at p (at most 32), followed by zeros. Does not access memory past them.
KVPAGE_INLINE VI LoadHalfLine(const char* p, int n) {
  if (n >= 2 * W) return (VI)_mm512_castsi256_si512(LoadBits<__m256i>(p));
  return (VI)_mm512_castsi256_si512(_mm256_maskz_loadu_epi8((std::uint32_t{1} << n) - 1, p));
}

struct Bytes {
  alignas(64) std::uint8_t byte[64];
};
KVPAGE_INLINE VI AsVector(const Bytes& bytes) { return LoadBits<VI>(bytes.byte); }

// PickBytes index that pairs bytes (columns) 0 .. 31 of a with those of b. The order is such that the lower halves of
// the quarters, taken together, hold columns 0 .. 15, and the upper halves the others.
constexpr Bytes PairsOfColumns() {
  Bytes index = {};
  for (int i = 0; i < 64; ++i) {
    const int quarter = i / 16, place = i % 16;
    index.byte[i] = static_cast<std::uint8_t>(i % 2 * 64 + place / 8 * 16 + quarter * 4 + place % 8 / 2);
  }
  return index;
}
constexpr Bytes kColumnPairs = PairsOfColumns();

// Interleave elements (bytes or pairs of bytes) of a and b, from the lower or the upper halves of their quarters.
KVPAGE_INLINE VI ZipBytesLow(VI a, VI b) { return (VI)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
KVPAGE_INLINE VI ZipBytesHigh(VI a, VI b) { return (VI)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
KVPAGE_INLINE VI ZipHalvesLow(VI a, VI b) { return (VI)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
KVPAGE_INLINE VI ZipHalvesHigh(VI a, VI b) { return (VI)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }

// One byte of the bfloat16 that equals the float8_e4m3fn `code`, without its sign, divided by ElementUnit.
constexpr std::uint8_t HalfOfFloat8(int code, bool high) {
  int exponent = code >> 3, mantissa = code & 7;
  if (exponent == 0) {  // subnormal: normalized, because bfloat16 products treat subnormals as zeros
    if (mantissa == 0) return 0;
    exponent = 1;
    for (; mantissa < 8; --exponent) mantissa *= 2;
    mantissa -= 8;
  }
  const int bits = (exponent - 7 - 8 + 127) << 7 | mantissa << 4;
  return static_cast<std::uint8_t>(high ? bits >> 8 : bits & 0xff);
}
constexpr Bytes Float8Table(int first, bool high) {
  Bytes table = {};
  for (int i = 0; i < 64; ++i) table.byte[i] = HalfOfFloat8(first + i, high);
  return table;
}
constexpr Bytes kFloat8Low[] = {Float8Table(0, false), Float8Table(64, false)};
constexpr Bytes kFloat8High[] = {Float8Table(0, true), Float8Table(64, true)};

// The low and high bytes of the bfloat16 that equal the codes. The tables are indexed by the lower 7 bits; the sign is
// added.
KVPAGE_INLINE void Float8Halves(VI codes, VI* low, VI* high) {
  *low = PickBytes(AsVector(kFloat8Low[0]), codes, AsVector(kFloat8Low[1]));
  const VI magnitude = PickBytes(AsVector(kFloat8High[0]), codes, AsVector(kFloat8High[1]));
  *high = magnitude | (codes & static_cast<std::int32_t>(0x80808080u));
}

// Loads the quarters at p[0][offset], p[4][offset], p[8][offset] and p[12][offset], each into its own place. n: bytes
// left in the rows; memory past them is not accessed.
template <bool kWhole>
KVPAGE_INLINE __m512i LoadQuarters(const char* const* p, std::int64_t offset, int n) {
  const auto quarter = [&](int i) {
    if (kWhole || n >= 16) return LoadBits<__m128i>(p[4 * i] + offset);
    return n <= 0 ? _mm_setzero_si128() : _mm_maskz_loadu_epi8((1u << n) - 1, p[4 * i] + offset);
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2)), quarter(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Transposes the squares of words within the quarters.
KVPAGE_INLINE void TransposeQuarters(const __m512i (&row)[4], VI (&out)[4]) {
  const __m512i ab = _mm512_unpacklo_epi32(row[0], row[1]), ab2 = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i cd = _mm512_unpacklo_epi32(row[2], row[3]), cd2 = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = (VI)_mm512_unpacklo_epi64(ab, cd);
  out[1] = (VI)_mm512_unpackhi_epi64(ab, cd);
  out[2] = (VI)_mm512_unpacklo_epi64(ab2, cd2);
  out[3] = (VI)_mm512_unpackhi_epi64(ab2, cd2);
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_BYTES_INL_H_
