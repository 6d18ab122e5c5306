// Prefill: many query rows. A tile of keys and values is packed once; then scores, softmax and weighted values are
// computed for one block of kRowBlock rows after the other, in the caches nearest to the core.
#ifndef KVPAGE_KERNELS_CPU_ISA_PREFILL_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_PREFILL_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/pack-inl.h"
#include "kernels/cpu/isa/product-inl.h"
#include "kernels/cpu/isa/softmax-inl.h"
#include "kernels/cpu/isa/state-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Lanes of a dot product that are summed in one chain. Longer chains would be less accurate than XLA's.
constexpr int kScoreLanes = 64;
constexpr float kOnes[kRowBlock] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// A tile of keys and values, packed for products in the lanes of L.
template <class L>
struct PackedTile {
  std::int64_t begin;  // position of its first token
  int size;
  const float* keys;
  const float* values;
  const float* scales;                  // of the first key, kSpanScales before its value's, or null
  int key_lanes;                        // lanes per query or key
  bool finite;                          // whether 0 times any value that is not visible to every row is 0
  typename L::TileResiduals residuals;  // for exact weights, if rounding leaves residuals
};

// The panel of value columns d / kPanel, starting at token `from`.
template <class L>
KVPAGE_INLINE const float* ValuesAt(const float* values, int d, int from) {
  return values + d * (kPrefillTokens / L::kElements) + from / L::kElements * kPanel;
}

template <class L>
bool FinitePanels(const float* values, int size, int padded_dim) {
  VF bad = {};
  for (int d = 0; d < padded_dim; d += kPanel) {
    const float* panel = ValuesAt<L>(values, d, 0);
    for (int i = 0; i < (size + L::kElements - 1) / L::kElements * kPanel; i += W) {
      bad += L::Check(LoadBits<VI>(panel + i));
    }
  }
  return SumOf(bad) == 0.0f;
}

// Processes one row over exactly the values it sees, for tiles in which 0 * value would be NaN. Uses the same products
// in the same order as Product, so that other tokens do not change a single bit. `panel` has room for one panel.
template <class L>
void CarefulValues(const float* values, Visible visible, const float* weights, const float* correction, float* acc,
                   int padded_dim, float* panel) {
  const int first = visible.from / L::kElements, lanes = (visible.to + L::kElements - 1) / L::kElements - first;
  for (int d = 0; d < padded_dim; d += kPanel) {
    __builtin_memcpy(panel, ValuesAt<L>(values, d, visible.from), std::int64_t{4} * lanes * kPanel);
    if (L::kElements == 2) {  // the other half of a pair
      float* last = panel + (lanes - 1) * kPanel;
      for (int i = 0; i < kPanel; i += W) {
        if (visible.from % 2 != 0) StoreBits(panel + i, LoadBits<VI>(panel + i) >> 16 << 16);
        if (visible.to % 2 != 0) StoreBits(last + i, LoadBits<VI>(last + i) & 0xffff);
      }
    }
    Product<L, 1>(weights + first, 0, panel, lanes, correction, acc + d, padded_dim);
  }
}

// Adds the tile to the state of rows block .. block + kRowBlock - 1. `scores` has room for kRowBlock rows of
// kPrefillTokens and a panel.
template <class L>
void PrefillBlock(const SpanArgs& args, const PackedTile<L>& tile, int block, const float* q, float* scores) {
  const int padded_dim = PaddedDim(args.tile.head_dim);
  const SoftmaxState state = StateOf(args, 0);
  const int count = args.tile.rows - block < kRowBlock ? args.tile.rows - block : kRowBlock;
  Visible visible[kRowBlock];
  int from = tile.size, to = 0;
  for (int r = 0; r < count; ++r) {
    visible[r] = VisibleTo(args.positions[block + r], args.window, tile.begin, tile.size);
    if (visible[r].from >= visible[r].to) continue;
    from = visible[r].from < from ? visible[r].from : from;
    to = visible[r].to > to ? visible[r].to : to;
  }
  if (from >= to) return;
  from = from / kPanel * kPanel;
  const int size = to - from;

  const std::int64_t panel_floats = std::int64_t{kPanel} * padded_dim;
  for (int k = 0; k < size; k += kPanel) {
    const float* keys = tile.keys + (from + k) / kPanel * panel_floats;
    for (int d = 0; d < tile.key_lanes; d += kScoreLanes) {
      const int lanes = tile.key_lanes - d < kScoreLanes ? tile.key_lanes - d : kScoreLanes;
      BlockProduct<L>(q + d, padded_dim / L::kElements, keys + d * kPanel, lanes, d == 0 ? nullptr : kOnes, scores + k,
                      kPrefillTokens);
    }
  }

  bool mixed = size % L::kElements != 0;
  const float* scales = tile.scales == nullptr ? nullptr : tile.scales + from;
  for (int r = 0; r < count; ++r) {
    visible[r].from -= from;
    visible[r].to -= from;
    mixed = mixed || visible[r].from > 0 || visible[r].to < size;
    if (scales != nullptr) ScaleScores(scales, size, scores + r * kPrefillTokens);
  }
  float correction[kRowBlock];
  for (int r = count; r < kRowBlock; ++r) correction[r] = 1.0f;
  SoftmaxArgs softmax = {args, args.slopes, tile.begin + from, size, kPrefillTokens};
  if (scales != nullptr) softmax.value_scales = scales + kSpanScales;
  typename L::BlockResiduals residuals = {};
  const bool with_residuals = L::kHasResiduals && args.exact_weights;
  if constexpr (L::kHasResiduals) {
    if (with_residuals) residuals = ResidualsFrom(tile.residuals, from);
  }
  Softmax<L>(softmax, state, block, count, visible, scores, correction, with_residuals ? &residuals : nullptr);

  float* acc = state.acc(block);
  if (mixed && !tile.finite) {
    for (int r = 0; r < count; ++r) {
      if (visible[r].from >= visible[r].to) continue;
      CarefulValues<L>(ValuesAt<L>(tile.values, 0, from), visible[r], scores + r * kPrefillTokens, correction + r,
                       acc + r * padded_dim, padded_dim, scores + kRowBlock * kPrefillTokens);
    }
  } else {
    for (int d = 0; d < padded_dim; d += kPanel) {
      BlockProduct<L>(scores, kPrefillTokens, ValuesAt<L>(tile.values, d, from),
                      (size + L::kElements - 1) / L::kElements, correction, acc + d, padded_dim);
    }
  }
  if constexpr (L::kHasResiduals) {
    if (with_residuals) AddResiduals(residuals, tile.residuals, from, size, acc, padded_dim);
  }
}

// Processes the span for all rows, in the lanes of L.
template <class T, class L>
void PrefillSpan(const SpanArgs& args) {
  const int rows = args.tile.rows, head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  float* keys = args.scratch;
  float* values = keys + kPrefillTokens * padded_dim;
  float* scores = values + kPrefillTokens * padded_dim;
  // Float32 rows are followed by bfloat16 rows (see QueryFloats).
  const int row_floats = padded_dim / L::kElements;
  const float* q = args.q + (L::kElements == 1 ? 0 : PaddedRows(rows) * padded_dim);
  // With one or two blocks of rows, a packed tile is used only once or twice, so it should stay in the nearest cache.
  const int tile_tokens = rows <= 2 * kRowBlock ? kPrefillTokens / 4 : kPrefillTokens;
  for (std::int64_t begin = args.begin; begin < args.end;) {
    const std::int64_t next = (begin / tile_tokens + 1) * tile_tokens;
    const std::int64_t end = next < args.end ? next : args.end;
    const int size = static_cast<int>(end - begin);
    int first = 0;  // rows before this one see nothing from this tile on
    while (first < rows && args.positions[first] < begin) ++first;
    int last = rows;  // for rows from this one on, the window begins after the tile
    if (args.window > 0) {
      while (last > first && args.positions[last - 1] - args.window + 1 >= end) --last;
    }
    first = first / kRowBlock * kRowBlock;
    if (first < last) {
      last = (last + kRowBlock - 1) / kRowBlock * kRowBlock;
      last = last < rows ? last : rows;
      const char* const* tokens = args.keys + (begin - args.begin);
      const char* const* value_rows = args.values + (begin - args.begin);
      const int key_lanes = head_dim / L::kElements;
      PackKeys<typename L::template Stored<T>>(tokens, size, key_lanes, std::int64_t{kPanel} * padded_dim, keys);
      // Whether some row does not see the whole tile.
      const bool mixed = size % L::kElements != 0 || args.positions[first] < end - 1 ||
                         (args.window > 0 && args.positions[last - 1] - args.window + 1 > begin);
      PackValues<T>(L{}, value_rows, args.value_offset, size, head_dim, values);
      PackedTile<L> packed = {begin,
                              size,
                              keys,
                              values,
                              args.scales == nullptr ? nullptr : args.scales + (begin - args.begin),
                              key_lanes,
                              !mixed || FinitePanels<L>(values, size, padded_dim),
                              {}};
      if constexpr (L::kHasResiduals) {
        if (args.exact_weights) {  // pairs use only half of the space for values
          float* room = values + kPrefillTokens * padded_dim / 2;
          packed.residuals = PackResidualValues(L{}, value_rows, args.value_offset, size, head_dim, room);
        }
      }
      for (int block = first; block < last; block += kRowBlock) {
        PrefillBlock<L>(args, packed, block, q + block * row_floats, scores);
      }
    }
    begin = end;
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_PREFILL_INL_H_
