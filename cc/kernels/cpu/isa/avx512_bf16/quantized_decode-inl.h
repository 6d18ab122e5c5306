// Decode on quantized keys and values for machines that can multiply bytes. The arithmetic of decode-inl.h would take
// longer per element than memory does; here, products of the stored elements handle four (int8) or two (float8) at a
// time.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_DECODE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_DECODE_INL_H_

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/avx512_bf16/bytes-inl.h"
#include "kernels/cpu/isa/avx512_bf16/pairs-inl.h"
#include "kernels/cpu/isa/avx512_bf16/quantized_operands-inl.h"
#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/decode_stream-inl.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/softmax-inl.h"
#include "kernels/cpu/isa/state-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// A tile is cut into four streams of `length` tokens (a multiple of four; the last stream may be incomplete). `tokens`
// lists the tokens in the order 0, length, 2 length, 3 length, 1, length + 1, ..., in groups of four; see
// Interleaved(). `values` lists their values in the same order; see SpanArgs.
struct QuantizedTile {
  const char* const* tokens;  // keys
  const char* const* values;
  std::int64_t value_offset;
  int length;
  // Rows to prefetch for each head: values while keys are used, and keys while values are used. The heads of a token
  // are listed together, so that prefetches follow the order of addresses, whatever the order of the arithmetic.
  const char* const* after_keys;
  const char* const* after_values;
};

// Stores the scores of sixteen tokens, starting at place i of the walk, where their tokens are in the tile. Lane j
// holds the score of the token at place i + j.
KVPAGE_INLINE void StoreInterleaved(VF scores, int i, int length, float* row) {
  const VI streams = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const VF sorted = (VF)_mm512_permutexvar_epi32((__m512i)streams, (__m512i)scores);
  KVPAGE_UNROLL for (int s = 0; s < 4; ++s) {
    __builtin_memcpy(row + s * length + i / 4, reinterpret_cast<const char*>(&sorted) + 16 * s, 16);
  }
}

// scores[R, kTileTokens] of rows `row` .. row + R - 1 against sixteen keys, starting at place i of the walk. Lines of
// the keys are transposed, so that lane j of a vector holds four elements of key i + j. kWhole: head_dim is a multiple
// of the line size.
template <int R, bool kInts, bool kWhole>
KVPAGE_NOINLINE void QuantizedScores(const QuantizedTile& tile, int i, std::int64_t offset, const char* const* after,
                                     const QuantizedQuery& q, int row, int head_dim, float* scores) {
  constexpr int P = kQueryParts<kInts>;
  VF sums[R][2];  // float8: of the first two and the other two keys in each quarter, two lanes per key
  VI parts[R][P];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = VF{};
    KVPAGE_UNROLL for (int part = 0; kInts && part < P; ++part) {
      parts[r][part] = SplatInt(q.start[(row + r) * P + part]);
    }
  }
  const char* const* tokens = tile.tokens + i;
  const std::int32_t* y = q.words + row * P * PaddedLine(head_dim) / 4;
  const std::int8_t* last_byte = q.last_byte + row * PaddedLine(head_dim) / 4;
  for (int d = 0; d < head_dim; d += W) {
    __asm__("" : "+r"(tokens));  // read again: GCC would keep pointers in vector registers, and moving them is slower
    __m512i quarters[4];
    KVPAGE_UNROLL for (int j = 0; j < 4; ++j) quarters[j] = LoadQuarters<kWhole>(tokens + j, offset + d, head_dim - d);
    VI words[4];
    TransposeQuarters(quarters, words);
    KVPAGE_UNROLL for (int j = 0; j < 4; ++j) {
      Prefetch(after[d / 4 % 16 + j] + tile.value_offset + d / 64 * 64);
      if constexpr (kInts) {
        const VI x = words[j] ^ static_cast<std::int32_t>(0x80808080u);
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          KVPAGE_UNROLL for (int part = 1; part < P; ++part) {
            parts[r][part] = DotBytes(parts[r][part], x, SplatInt(y[(j * R + r) * P + part]));
          }
        }
        if (last_byte[d / 4 + j]) {
          KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
            parts[r][0] = DotBytes(parts[r][0], x, SplatInt(y[(j * R + r) * P]));
          }
        }
      } else {
        VI low, high;
        Float8Halves(words[j], &low, &high);
        const VI x0 = ZipBytesLow(low, high), x1 = ZipBytesHigh(low, high);
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          const VI z = SplatPairs(y + (j * R + r) * P);
          sums[r][0] = DotPairs(sums[r][0], x0, z);
          sums[r][1] = DotPairs(sums[r][1], x1, z);
        }
      }
    }
    y += 4 * R * P;
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    VF sum;
    if constexpr (kInts) {
      sum = __builtin_convertvector(parts[r][P - 1], VF);
      KVPAGE_UNROLL for (int part = P - 2; part >= 0; --part) {
        sum = Fma(sum, Splat(256.0f), __builtin_convertvector(parts[r][part], VF));
      }
      sum *= q.unit[row + r];
    } else {
      sum = _mm512_shuffle_ps(sums[r][0], sums[r][1], 0x88) + _mm512_shuffle_ps(sums[r][0], sums[r][1], 0xdd);
    }
    StoreInterleaved(sum, i, tile.length, scores + r * kTileTokens);
  }
}

// acc[R, d .. d + 32) = acc * keep + weights * values.
template <int R, int L, bool kWhole>
KVPAGE_NOINLINE void QuantizedValues(const QuantizedTile& tile, std::int64_t offset, const char* const* after, int d,
                                     int head_dim, const std::int32_t* words, const float* unit, const float* keep,
                                     float* acc, int padded_dim) {
  constexpr int P = kWeightParts<L>;
  VF sums[R][2];
  VI parts[R][P][2];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = VF{};
    KVPAGE_UNROLL for (int l = 0; l < L; ++l) parts[r][l][0] = parts[r][l][1] = VI{};
  }
  offset += d;
  // Each half of a line prefetches half of the rows.
  if (d % 64 != 0) after += 2 * tile.length;
  for (int g = 0; g < tile.length; ++g) {
    VI x[4];
    KVPAGE_UNROLL for (int j = 0; j < 4; ++j) {
      x[j] = LoadHalfLine(tile.values[4 * g + j] + tile.value_offset + offset, kWhole ? 2 * W : head_dim - d);
    }
    Prefetch(after[2 * g] + d / 64 * 64);
    Prefetch(after[2 * g + 1] + d / 64 * 64);
    const VI columns = AsVector(kColumnPairs);
    const VI first = PickBytes(x[0], columns, x[1]), second = PickBytes(x[2], columns, x[3]);
    if constexpr (L > 0) {
      const VI y0 = ZipHalvesLow(first, second), y1 = ZipHalvesHigh(first, second);
      KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
        KVPAGE_UNROLL for (int l = 0; l < L; ++l) {
          const VI w = SplatInt(words[(r * P + l) * W + g]);
          parts[r][l][0] = DotBytes(parts[r][l][0], w, y0);
          parts[r][l][1] = DotBytes(parts[r][l][1], w, y1);
        }
      }
    } else {
      KVPAGE_UNROLL for (int p = 0; p < 2; ++p) {
        VI low, high;
        Float8Halves(p == 0 ? first : second, &low, &high);
        const VI y0 = ZipBytesLow(low, high), y1 = ZipBytesHigh(low, high);
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          const VI w = SplatInt(words[(r * P + p) * W + g]);
          sums[r][0] = DotPairs(sums[r][0], y0, w);
          sums[r][1] = DotPairs(sums[r][1], y1, w);
        }
      }
    }
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    KVPAGE_UNROLL for (int v = 0; v < 2; ++v) {
      VF sum = sums[r][v];
      if constexpr (L > 0) {
        sum = __builtin_convertvector(parts[r][L - 1][v], VF);
        KVPAGE_UNROLL for (int l = L - 2; l >= 0; --l) {
          sum = Fma(sum, Splat(256.0f), __builtin_convertvector(parts[r][l][v], VF));
        }
      }
      float* to = acc + r * padded_dim + d + v * W;
      StoreFloats(to, Fma(LoadFloats(to), Splat(keep[r]), sum * Splat(unit[r])));
    }
  }
}

// Processes one tile for all heads of the span. `words` has room for the weights of all rows.
template <int L, bool kWhole>
void DecodeQuantizedTile(const SpanArgs& args, const QuantizedTile& tile, int size, std::int64_t begin,
                         const QuantizedQuery& q, float* scores, std::int32_t* words) {
  constexpr int kWords = kWeightParts<L> * W;
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  const std::int64_t scores_stride = rows * kTileTokens;
  const char* const* after = tile.after_keys;
  for (int i = 0; i < 4 * tile.length; i += W) {
    for (int h = 0; h < args.heads; ++h, after += W) {
      const QuantizedQuery mine = OfHead<(L > 0)>(q, h, rows, head_dim);
      ForRowGroups(rows, [&](int r, auto count) {
        QuantizedScores<decltype(count)::value, (L > 0), kWhole>(
            tile, i, h * args.head_stride, after, mine, r, head_dim, scores + h * scores_stride + r * kTileTokens);
      });
    }
  }

  Visible visible[kDecodeRows];
  for (int r = 0; r < rows; ++r) visible[r] = VisibleTo(args.positions[r], args.window, begin, size);
  float correction[kMaxHeads * kDecodeRows], unit[kMaxHeads * kDecodeRows];
  for (int h = 0; h < args.heads; ++h) {
    float* weights = scores + h * scores_stride;
    const float* slopes = args.slopes == nullptr ? nullptr : args.slopes + h * args.tile.group;
    const float* scales = args.scales + h * 2 * kSpanScales + (begin - args.begin);
    for (int r = 0; r < rows; ++r) ScaleScores(scales, size, weights + r * kTileTokens);
    Softmax<FloatLanes>({args, slopes, begin, size}, StateOf(args, h), 0, rows, visible, weights,
                        correction + h * kDecodeRows);
    float factors[kTileTokens], one = 0.0f;
    for (int r = 0; r < rows; ++r) {
      const bool as_before = r > 0 && visible[r].from == visible[r - 1].from && visible[r].to == visible[r - 1].to;
      if (!as_before) one = ValueScales<L>(scales + kSpanScales, visible[r], 4 * tile.length, factors);
      unit[h * kDecodeRows + r] = one;
      VI parts[kWeightParts<L>];
      QuantizeWeights<L>(weights + r * kTileTokens, factors, tile.length, parts);
      KVPAGE_UNROLL for (int part = 0; part < kWeightParts<L>; ++part) {
        StoreBits(words + (h * rows + r) * kWords + part * W, parts[part]);
      }
    }
  }

  after = tile.after_values;
  for (int h = 0; h < args.heads; ++h, after += 4 * tile.length) {
    ForRowGroups(rows, [&](int r, auto count) {
      for (int d = 0; d < head_dim; d += 2 * W) {
        QuantizedValues<decltype(count)::value, L, kWhole>(
            tile, h * args.head_stride, after, d, head_dim, words + (h * rows + r) * kWords, unit + h * kDecodeRows + r,
            correction + h * kDecodeRows + r, StateOf(args, h).acc(r), padded_dim);
      }
    });
  }
}

template <int L>
void DecodeQuantizedSpan(const SpanArgs& args) {
  constexpr int P = kQueryParts<(L > 0)>;
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  const int line = PaddedLine(head_dim), all_rows = args.heads * rows;
  float* next = args.scratch;
  const auto take = [&](std::int64_t floats) {
    float* here = next;
    next += (floats + W - 1) / W * W;
    return here;
  };
  float* scores = take(std::int64_t{all_rows} * kTileTokens);
  auto* weights = reinterpret_cast<std::int32_t*>(take(std::int64_t{all_rows} * kWeightParts<L> * W));
  QuantizedQuery q;
  q.words = reinterpret_cast<std::int32_t*>(take(std::int64_t{all_rows} * P * line / 4));
  q.start = reinterpret_cast<std::int32_t*>(take(std::int64_t{all_rows} * P));
  q.unit = take(all_rows);
  q.last_byte = reinterpret_cast<std::int8_t*>(take(std::int64_t{all_rows} * line / 16));
  for (int h = 0; h < args.heads; ++h) {
    const float* rows_of_head = args.q + h * QueryFloats(rows, head_dim);
    ForRowGroups(rows, [&](int r, auto count) {
      QuantizeQueries<decltype(count)::value, (L > 0)>(rows_of_head, rows_of_head + rows * padded_dim, r, padded_dim,
                                                       line, OfHead<(L > 0)>(q, h, rows, head_dim));
    });
  }

  const bool two_lists = args.values != args.keys;
  const char* walk[kSpanTokens + kLookahead];
  const char* values_walk[kSpanTokens + kLookahead];
  ListInterleaved(args, args.keys, walk);
  if (two_lists) ListInterleaved(args, args.values, values_walk);
  const auto readable = static_cast<int>(args.readable - args.begin);
  QuantizedTile tile;
  tile.value_offset = args.value_offset;
  const char* later[2][kMaxHeads * kTileTokens];
  for (std::int64_t begin = args.begin; begin < args.end;) {
    const std::int64_t after = (begin / kTileTokens + 1) * kTileTokens;
    const std::int64_t end = after < args.end ? after : args.end;
    const int size = static_cast<int>(end - begin), first = static_cast<int>(begin - args.begin);
    tile.tokens = walk + first;
    tile.values = (two_lists ? values_walk : walk) + first;
    tile.length = kTileTokens / 4;
    const char *part[kTileTokens], *values_part[kTileTokens];
    if (size < kTileTokens) {  // missing tokens of a stream are replaced by the last token, with a weight of zero
      tile.length = (size + W - 1) / W * 4;
      for (int k = 0; k < 4 * tile.length; ++k) {
        const int token = Interleaved(k, tile.length), at = first + (token < size ? token : size - 1);
        part[k] = args.keys[at];
        values_part[k] = args.values[at];
      }
      tile.tokens = part;
      tile.values = values_part;
    }
    // While keys are used, their values are prefetched; while values are used, the next tile's keys.
    const int listed = 4 * tile.length;
    tile.after_keys = tile.values;
    tile.after_values = first + size + listed <= readable ? walk + first + size : tile.tokens;
    if (args.heads > 1) {
      for (int k = 0; k < listed; ++k) {
        const char *value = tile.after_keys[k], *next_key = tile.after_values[k];
        for (int h = 0; h < args.heads; ++h) {
          later[0][k * args.heads + h] = value + h * args.head_stride;
          later[1][k * args.heads + h] = next_key + h * args.head_stride;
        }
      }
      tile.after_keys = later[0];
      tile.after_values = later[1];
    }
    if (head_dim % (4 * W) == 0) {
      DecodeQuantizedTile<L, true>(args, tile, size, begin, q, scores, weights);
    } else {
      DecodeQuantizedTile<L, false>(args, tile, size, begin, q, scores, weights);
    }
    begin = end;
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_QUANTIZED_DECODE_INL_H_
