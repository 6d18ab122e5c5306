// The order in which decode reads the keys and values of a span, and its prefetches. Decode is bound by memory, and
// this determines how much of the bandwidth it gets.
#ifndef KVPAGE_KERNELS_CPU_ISA_DECODE_STREAM_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_DECODE_STREAM_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/target-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Prefetch distance: this many bytes of one head, or of all heads that are processed together, but at least
// kPrefetchTokens tokens and at most a tile. Prefetches go to the L2 cache, which allows more outstanding requests than
// L1; that made the difference between half and full memory bandwidth.
constexpr int kPrefetchBytes = 8192;
constexpr int kPrefetchBytesOfHeads = 131072;
constexpr int kPrefetchTokens = 24;

KVPAGE_INLINE void Prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// The tokens of a full tile are read in the order 0, 16, 32, 48, 1, 17, ...: as several streams, each in its own pages.
// The hardware prefetcher follows each stream, in addition to the prefetches here, which keeps more requests
// outstanding.
constexpr int kStreams = 4;
KVPAGE_INLINE int Interleaved(int i, int length) { return i % kStreams * length + i / kStreams; }

// Lists the keys (or values) of a span in that order: full tiles are interleaved; an incomplete tile and the tokens to
// prefetch keep their order. `walk` has room for all of them.
KVPAGE_INLINE void ListInterleaved(const SpanArgs& args, const char* const* rows, const char** walk) {
  const auto readable = static_cast<int>(args.readable - args.begin);
  for (int i = 0; i < readable;) {
    if ((args.begin + i) % kTileTokens == 0 && i + kTileTokens <= readable) {
      for (int k = 0; k < kTileTokens; ++k) walk[i + k] = rows[i + Interleaved(k, kTileTokens / kStreams)];
      i += kTileTokens;
    } else {
      walk[i] = rows[i];
      ++i;
    }
  }
}

// Keys and values of a tile in reading order; see SpanArgs.
struct DecodeTokens {
  const char* const* tokens;  // keys
  const char* const* values;
  std::int64_t value_offset;
  int size;
  int readable;  // tokens from `size` on belong to the next tile
  int ahead;     // how many tokens ahead to prefetch, at most kTileTokens
  int heads;     // processed together, head_stride apart
  std::int64_t head_stride;
};

// The row that is read `ahead` tokens after key (or value) i of the tile: keys, then values, then the next tile's keys.
// It is prefetched one cache line at a time between the arithmetic, because a burst of requests would delay the loads.
KVPAGE_INLINE const char* AheadOfKey(const DecodeTokens& tile, int i) {
  i += tile.ahead;
  if (i < tile.size) return tile.tokens[i];
  return tile.values[i - tile.size < tile.size ? i - tile.size : tile.size - 1] + tile.value_offset;
}
KVPAGE_INLINE const char* AheadOfValue(const DecodeTokens& tile, int i) {
  if (i + tile.ahead < tile.size) return tile.values[i + tile.ahead] + tile.value_offset;
  if (i + tile.ahead < tile.readable) return tile.tokens[i + tile.ahead];
  return tile.values[i] + tile.value_offset;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(r, Count<R>) for groups of R query rows, which share the loads of keys and values.
template <class F>
KVPAGE_INLINE void ForRowGroups(int rows, const F& f) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) f(r, Count<4>{});
  if (rows & 2) f(r, Count<2>{});
  r += rows & 2;
  if (rows & 1) f(r, Count<1>{});
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_DECODE_STREAM_INL_H_
