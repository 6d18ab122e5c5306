// Decode: few query rows. Every key and value is read from memory once, in its stored form, and all rows use it while
// it is in registers. Both scores (dot products) and weighted values are computed along the head dimension.
#ifndef KVPAGE_KERNELS_CPU_ISA_DECODE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_DECODE_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/decode_stream-inl.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/softmax-inl.h"
#include "kernels/cpu/isa/state-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Values are weighted and summed in groups of this many tokens, over the whole head: sums stay short, and memory is
// read nearly in order. The same for every layout, because it affects the last bits of a result.
constexpr int kValueTokens = 16;

// Lane r * K + j of sums is the score of row r for the tile's key i + j.
template <int R>
KVPAGE_INLINE void StoreScores(VF sums, float* scores) {
  constexpr int K = W / R;
  float lanes[W];
  StoreFloats(lanes, sums);
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * kTileTokens, lanes + r * K, K * 4);
}

// scores[heads][R, kTileTokens] of R query rows against the keys of a tile, in the lanes of L. `queries` points to the
// first head and row; q_stride is the distance between heads, in lanes.
template <class T, class L, int R>
KVPAGE_NOINLINE void DecodeScores(const DecodeTokens& tile, const float* queries, std::int64_t q_stride, int padded_dim,
                                  int head_dim, float* head_scores, std::int64_t scores_stride) {
  constexpr int K = W / R;
  constexpr int kStep = L::kElements * W;  // elements per vector
  using Key = typename L::template Stored<T>;
  for (int i = 0; i < tile.size; i += K) {
    for (int h = 0; h < tile.heads; ++h) {
      const float* q = queries + h * q_stride;
      const std::int64_t offset = h * tile.head_stride;
      const char* key[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) {
        key[j] = tile.tokens[i + j < tile.size ? i + j : tile.size - 1] + offset;
      }
      const char* ahead[K];
      KVPAGE_UNROLL for (int j = 0; j < K; ++j) ahead[j] = AheadOfKey(tile, i + j) + offset;
      VF acc[W];
      KVPAGE_UNROLL for (int a = 0; a < W; ++a) acc[a] = VF{};
      for (int d = 0; d + kStep <= head_dim; d += kStep) {
        VI x[K];
        KVPAGE_UNROLL for (int j = 0; j < K; ++j) x[j] = L::template Load<Key>(key[j] + d * T::kSize);
        if (kStep * T::kSize >= 64 || d * T::kSize % 64 == 0) {
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) Prefetch(ahead[j] + d * T::kSize);
        }
        KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
          const VI y = LoadBits<VI>(q + r * (padded_dim / L::kElements) + d / L::kElements);
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) acc[r * K + j] = L::MulAdd(acc[r * K + j], x[j], y);
        }
      }
      if constexpr (L::kElements == 2) {
        if (head_dim % kStep != 0) {  // half a vector remains: head_dim is a multiple of W here
          const int d = head_dim - W;
          KVPAGE_UNROLL for (int j = 0; j < K; ++j) {
            const VI x = L::LoadHalf(key[j] + d * T::kSize);
            KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
              const VI y = LoadBits<VI>(q + r * (padded_dim / L::kElements) + d / L::kElements);
              acc[r * K + j] = L::MulAdd(acc[r * K + j], x, y);
            }
          }
        }
      }
      StoreScores<R>(SumEach(acc), head_scores + h * scores_stride + i);
    }
  }
}

// Accumulators of bfloat16 values hold every full group of 2 W elements in the order of LoadEvenOdd until the span
// ends.
template <class T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<BF16> = true;

void RestoreOrder(float* acc, int head_dim) {
  for (int d = 0; d + 2 * W <= head_dim; d += 2 * W) {
    const VF even = LoadFloats(acc + d), odd = LoadFloats(acc + d + W);
    StoreFloats(acc + d, ZipLow(even, odd));
    StoreFloats(acc + d + W, ZipHigh(even, odd));
  }
}

// acc[R, d .. d + V * W) = acc * correction + weights[R, from .. to) * values.
template <class T, int R, int V>
KVPAGE_NOINLINE void DecodeValues(const DecodeTokens& tile, std::int64_t offset, int from, int to, int d,
                                  const float* weights, const float* correction, float* acc, int padded_dim) {
  VF sum[R][V];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) { KVPAGE_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = VF{}; }
  offset += d * T::kSize;
  for (int i = from; i < to; ++i) {
    const char* value = tile.values[i] + tile.value_offset + offset;
    const char* ahead = AheadOfValue(tile, i) + offset;
    KVPAGE_UNROLL for (int line = 0; line < V * W * T::kSize; line += 64) Prefetch(ahead + line);
    VF x[V];
    if constexpr (kEvenOdd<T> && V % 2 == 0) {
      KVPAGE_UNROLL for (int v = 0; v < V; v += 2) LoadEvenOdd(value + v * W * T::kSize, &x[v], &x[v + 1]);
    } else {
      KVPAGE_UNROLL for (int v = 0; v < V; ++v) x[v] = LoadAs(T{}, value + v * W * T::kSize);
    }
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      const VF p = Splat(weights[r * kTileTokens + i]);
      KVPAGE_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Fma(x[v], p, sum[r][v]);
    }
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    const VF keep = Splat(correction[r]);
    KVPAGE_UNROLL for (int v = 0; v < V; ++v) {
      float* to = acc + r * padded_dim + d + v * W;
      StoreFloats(to, Fma(LoadFloats(to), keep, sum[r][v]));
    }
  }
}

template <class T, int R>
KVPAGE_INLINE void DecodeValuesOfHead(const DecodeTokens& tile, std::int64_t offset, int from, int to,
                                      const float* weights, const float* correction, float* acc, int padded_dim,
                                      int head_dim) {
  constexpr int V = W == 16 ? (R == 4 ? 4 : 8) : 8 / R;
  int d = 0;
  for (; d + V * W <= head_dim; d += V * W) {
    DecodeValues<T, R, V>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
  }
  for (; d + 2 * W <= head_dim; d += 2 * W) {
    DecodeValues<T, R, 2>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
  }
  if (d < head_dim) DecodeValues<T, R, 1>(tile, offset, from, to, d, weights, correction, acc, padded_dim);
}

// Converts a tile to zero-padded float32 rows, for head sizes that are not a multiple of the vector size: a vector load
// past the end of a row could access unmapped memory.
template <class T>
void StageTile(const char* const* tokens, std::int64_t offset, int size, int head_dim, float* dst,
               const char** dst_rows) {
  const int padded_dim = PaddedDim(head_dim);
  for (int i = 0; i < size; ++i) {
    const char* src = tokens[i] + offset;
    float* out = dst + i * padded_dim;
    for (int d = 0; d < padded_dim; d += W) StoreFloats(out + d, LoadFirst<T>(src + d * T::kSize, head_dim - d));
    dst_rows[i] = reinterpret_cast<const char*>(out);
  }
}

// The same tokens, in the order of ListInterleaved.
struct InterleavedTokens {
  const char* const* tokens;
  const char* const* values;
};

// Processes one tile of tile.heads KV heads, starting at `head`; keys and values are stored as T, in whole vectors. The
// members of `interleaved` are null if there is no other order. `scores` has room for kTileTokens of every head and
// row.
template <class T, class L>
void DecodeTile(const SpanArgs& args, DecodeTokens tile, InterleavedTokens interleaved, std::int64_t begin, int head,
                float* scores) {
  const int rows = args.tile.rows, head_dim = (args.tile.head_dim + W - 1) / W * W;
  const int padded_dim = PaddedDim(args.tile.head_dim);
  const std::int64_t q_stride = QueryFloats(rows, args.tile.head_dim), scores_stride = rows * kTileTokens;
  Visible visible[kDecodeRows];
  bool mixed = false;
  for (int r = 0; r < rows; ++r) {
    visible[r] = VisibleTo(args.positions[r], args.window, begin, tile.size);
    mixed = mixed || visible[r].from > 0 || visible[r].to < tile.size;
  }
  if (interleaved.tokens != nullptr && !mixed && tile.size == kTileTokens && args.slopes == nullptr &&
      args.scales == nullptr) {
    tile.tokens = interleaved.tokens;
    tile.values = interleaved.values;
  }
  const float* q = args.q + head * q_stride + (L::kElements == 1 ? 0 : rows * padded_dim);  // see QueryFloats
  ForRowGroups(rows, [&](int r, auto count) {
    DecodeScores<T, L, decltype(count)::value>(tile, q + r * (padded_dim / L::kElements), q_stride, padded_dim,
                                               head_dim, scores + r * kTileTokens, scores_stride);
  });

  float correction[kMaxHeads * kDecodeRows];
  bool finite[kMaxHeads];
  for (int h = 0; h < tile.heads; ++h) {
    float* weights = scores + h * scores_stride;
    const float* slopes = args.slopes == nullptr ? nullptr : args.slopes + (head + h) * args.tile.group;
    const float* scales =
        args.scales == nullptr ? nullptr : args.scales + (head + h) * 2 * kSpanScales + (begin - args.begin);
    for (int r = 0; scales != nullptr && r < rows; ++r) ScaleScores(scales, tile.size, weights + r * kTileTokens);
    SoftmaxArgs softmax = {args, slopes, begin, tile.size};
    if (scales != nullptr) softmax.value_scales = scales + kSpanScales;
    Softmax<FloatLanes>(softmax, StateOf(args, head + h), 0, rows, visible, weights, correction + h * kDecodeRows);
    finite[h] = !mixed || AllFinite<T>(tile.values, tile.value_offset + h * tile.head_stride, tile.size, head_dim);
  }

  for (int i = 0; i < tile.size; i += kValueTokens) {
    const int end = i + kValueTokens < tile.size ? i + kValueTokens : tile.size;
    for (int h = 0; h < tile.heads; ++h) {
      const float* weights = scores + h * scores_stride;
      const SoftmaxState state = StateOf(args, head + h);
      float* keep = correction + h * kDecodeRows;
      const std::int64_t offset = h * tile.head_stride;
      if (!finite[h]) {
        for (int r = 0; r < rows; ++r) {
          DecodeValuesOfHead<T, 1>(tile, offset, visible[r].from > i ? visible[r].from : i,
                                   visible[r].to < end ? visible[r].to : end, weights + r * kTileTokens, keep + r,
                                   state.acc(r), padded_dim, head_dim);
        }
      } else {
        ForRowGroups(rows, [&](int r, auto count) {
          DecodeValuesOfHead<T, decltype(count)::value>(tile, offset, i, end, weights + r * kTileTokens, keep + r,
                                                        state.acc(r), padded_dim, head_dim);
        });
      }
      for (int r = 0; r < rows; ++r) keep[r] = 1.0f;
    }
  }
}

template <class T, class L>
void DecodeSpan(const SpanArgs& args) {
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  float* scores = args.scratch;
  float* staged = scores + args.heads * PaddedRows(rows) * (kTileTokens + 1);
  const char* staged_rows[2 * kTileTokens];
  const bool two_lists = args.values != args.keys;
  const char* interleaved[kSpanTokens + kLookahead];
  const char* interleaved_values[kSpanTokens + kLookahead];
  ListInterleaved(args, args.keys, interleaved);
  if (two_lists) ListInterleaved(args, args.values, interleaved_values);
  for (std::int64_t begin = args.begin; begin < args.end;) {
    const std::int64_t next = (begin / kTileTokens + 1) * kTileTokens;
    const std::int64_t end = next < args.end ? next : args.end;
    const int size = static_cast<int>(end - begin);
    const std::int64_t first = begin - args.begin;
    const char* const* keys = args.keys + first;
    const char* const* values = args.values + first;
    if (head_dim % W == 0) {
      const int bytes = args.heads > 1 ? kPrefetchBytesOfHeads : kPrefetchBytes;
      const int ahead = bytes / (args.heads * head_dim * T::kSize);
      const DecodeTokens tile = {
          keys,
          values,
          args.value_offset,
          size,
          static_cast<int>(args.readable - begin),
          ahead < kPrefetchTokens ? kPrefetchTokens : (ahead < kTileTokens ? ahead : kTileTokens),
          args.heads,
          args.head_stride};
      const InterleavedTokens other = {interleaved + first, (two_lists ? interleaved_values : interleaved) + first};
      DecodeTile<T, L>(args, tile, other, begin, 0, scores);
    } else {
      for (int h = 0; h < args.heads; ++h) {
        const std::int64_t offset = h * args.head_stride;
        const std::int64_t value_distance = static_cast<std::int64_t>(kTileTokens) * padded_dim * 4;
        StageTile<T>(keys, offset, size, head_dim, staged, staged_rows);
        StageTile<T>(values, offset + args.value_offset, size, head_dim, staged + kTileTokens * padded_dim,
                     staged_rows + kTileTokens);
        const DecodeTokens tile = {staged_rows, staged_rows, value_distance, size, 0, kTileTokens, 1, 0};
        DecodeTile<F32, FloatLanes>(args, tile, {}, begin, h, scores);
      }
    }
    begin = end;
  }
  if (kEvenOdd<T> && head_dim % W == 0 && !args.more) {
    for (int h = 0; h < args.heads; ++h) {
      for (int r = 0; r < rows; ++r) RestoreOrder(StateOf(args, h).acc(r), head_dim);
    }
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_DECODE_INL_H_
