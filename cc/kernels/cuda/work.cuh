// How attention is cut into work: what the planner (plan.cuh) writes and the kernels read.
//
// A unit is a sequence, a KV head and a tile of rows; a row is one (query token, query head). Its context is cut into
// spans at fixed positions that depend on the sequence alone. Every span gives a state of its own (max, sum, weighted
// values), and states are folded from left to right, by the block that computed them all or, for a unit that several
// blocks share, by whichever of them ends last. Both do the same arithmetic, so how the work was shared out never shows
// in the result.
//
// Few rows (kTileRows at most in the fast decode kernel, tiles of as many in the general one): the spans of all units
// form one line, which is cut into as many pieces of equal cost as there are blocks. Only a unit with a cut inside
// leaves states in memory. Many rows (prefill.cuh): blocks take units, or single spans of them, from a queue.
#ifndef KVPAGE_KERNELS_CUDA_WORK_CUH_
#define KVPAGE_KERNELS_CUDA_WORK_CUH_

#include <cstddef>
#include <cstdint>

#include "base/attention_options.h"
#include "base/device_table.h"
#include "base/dtype.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/scratch.h"

namespace kvpage::cuda {

inline constexpr int kWarps = kThreads / kWarpSize;

// Pointers into the scratch memory.
struct Plan {
  PlanCounts* counts;
  Sequence* few;          // [num_sequences] those with few rows, dense
  Sequence* many;         // [num_sequences]
  std::int64_t* prefix;   // [num_sequences + 1] cost of the sequences before
  std::int32_t* items;    // [num_sequences + 1] prefill's units before
  std::int32_t* states;   // [num_sequences + 1] prefill's spans of units before
  Cut* cuts;              // [blocks + 1]
  Shared* shared;         // [blocks]
  std::int32_t* arrived;  // [prefill_slots] spans of the unit that are done, prefill
  float* values;          // states of decode, [rows, span_slots, head_dim]
  float2* sums;           // [rows, span_slots] max and sum
  float* prefill_states;  // [prefill_slots, PrefillStateFloats]
};

// A kernel's parameters.
struct AttentionParams {
  const CheckedBatch* checked;
  Plan plan;
  const void* q;
  void* out;
  float* lse;                // or null
  AttentionOptions options;  // the kernels read the window in the CheckedBatch
  std::int64_t num_tokens;
  std::int32_t num_sequences;
  std::int32_t num_q_heads;
  std::int32_t num_kv_heads;
  std::int32_t group;
  std::int32_t head_dim;
  std::int32_t few_rows;      // sequences with more rows go to prefill
  std::int32_t prefill_rows;  // rows of a tile there
  std::int32_t blocks;        // of every attention kernel's grid
  std::int32_t span_slots;
  std::int32_t prefill_slots;
  std::int32_t stages;       // of the pipeline
  std::int32_t tile_tokens;  // general.cuh
  std::int32_t row_stride;   // general.cuh: bytes of a key in shared memory
  DType q_dtype;
};

// What the rows of a sequence look at.
struct Extent {
  std::int32_t begin, end;  // positions that any row sees
  std::int32_t tiles;       // of rows
  std::int32_t shift;       // spans are 1 << shift tokens
};

__device__ __forceinline__ std::int32_t FirstVisible(std::int32_t position, std::int32_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// Positions [begin, end) that any of some rows sees, and [all_begin, all_end) that all of them see.
struct VisibleRange {
  std::int32_t begin, end, all_begin, all_end;

  // Of rows whose query tokens are at positions first to last.
  __device__ __forceinline__ static VisibleRange Of(std::int32_t first, std::int32_t last, std::int32_t window) {
    return {FirstVisible(first, window), last + 1, FirstVisible(last, window), first + 1};
  }
  // Whether the rows see different ones of `count` tokens.
  __device__ __forceinline__ bool Mixed(std::int32_t token, int count) const {
    return token < all_begin || token + count > all_end;
  }
};

__device__ __forceinline__ int SpanShift(std::int32_t tokens, int shift, int max_spans) {
  // One more span where the first one starts before the context does.
  while (tokens > (std::int64_t{max_spans - 1} << shift)) ++shift;
  return shift;
}

__device__ __forceinline__ Extent FewExtent(const Sequence& s, std::int32_t window, std::int32_t group) {
  Extent e;
  e.begin = FirstVisible(s.position, window);
  e.end = s.position + s.query_length;
  e.tiles = static_cast<std::int32_t>((std::int64_t{s.query_length} * group + kTileRows - 1) / kTileRows);
  e.shift = SpanShift(e.end - e.begin, kSpanShift, kMaxSpans);
  return e;
}

__device__ __forceinline__ Extent PrefillExtent(const Sequence& s, std::int32_t window, const AttentionParams& p) {
  Extent e;
  e.begin = FirstVisible(s.position, window);
  e.end = s.position + s.query_length;
  e.tiles = static_cast<std::int32_t>((std::int64_t{s.query_length} * p.group + p.prefill_rows - 1) / p.prefill_rows);
  e.shift = std::int64_t{e.tiles} * p.num_kv_heads >= kPlenty
                ? 30
                : SpanShift(e.end - e.begin, kPrefillSpanShift, kMaxPrefillSpans);
  return e;
}

__device__ __forceinline__ int NumSpans(const Extent& e) { return ((e.end - 1) >> e.shift) - (e.begin >> e.shift) + 1; }

// The part of a unit that a block works on.
struct Unit {
  Sequence sequence;
  std::int32_t head;
  std::int32_t first_row;  // of the tile; row r is token (first_row + r) / group
  std::int32_t rows;
  std::int32_t begin, end;  // positions that any row of the tile sees
  std::int32_t shift;
  std::int32_t from, to;      // the piece: [max(from, begin), min(to, end))
  std::int32_t first_span;    // of the sequence: states are counted from it
  std::int32_t shared_index;  // in Plan::shared, -1 when this block does it all
};

// Walks a block's piece of the line, tile by tile of `tokens` tokens, a power of two up to 128. All threads hold the
// same.
struct Walker {
  Unit unit;
  std::int32_t token;  // where the tile begins, a multiple of the tile's size
  bool done;
  std::int32_t sequence, index, units;

  __device__ __forceinline__ bool FirstTile() const { return token <= max(unit.from, unit.begin); }
  __device__ __forceinline__ std::int32_t PieceEnd() const { return min(unit.to, unit.end); }

  __device__ __forceinline__ void Start(const AttentionParams& p, const Cut& from, const Cut& to, int tokens) {
    sequence = from.sequence;
    index = from.unit;
    done = from.sequence == to.sequence && from.unit == to.unit && from.token == to.token;
    if (!done) Enter(p, from, to, tokens);
  }

  __device__ __forceinline__ void Next(const AttentionParams& p, const Cut& from, const Cut& to, int tokens) {
    token += tokens;
    if (token < PieceEnd()) return;
    if (++index == units) {
      index = 0;
      ++sequence;
    }
    done =
        sequence > to.sequence || (sequence == to.sequence && (index > to.unit || (index == to.unit && to.token == 0)));
    if (!done) Enter(p, from, to, tokens);
  }

  __device__ __forceinline__ void Enter(const AttentionParams& p, const Cut& from, const Cut& to, int tokens) {
    unit.sequence = p.plan.few[sequence];
    const std::int32_t window = p.checked->sliding_window;
    const Extent e = FewExtent(unit.sequence, window, p.group);
    units = e.tiles * p.num_kv_heads;
    // The last rows first: theirs is the longest context.
    const std::int32_t tile = e.tiles - 1 - index / p.num_kv_heads;
    unit.head = index % p.num_kv_heads;
    unit.first_row = tile * kTileRows;
    unit.rows = static_cast<std::int32_t>(
        min(std::int64_t{kTileRows}, std::int64_t{unit.sequence.query_length} * p.group - unit.first_row));
    unit.begin = FirstVisible(unit.sequence.position + unit.first_row / p.group, window);
    unit.end = unit.sequence.position + (unit.first_row + unit.rows - 1) / p.group + 1;
    unit.shift = e.shift;
    unit.first_span = e.begin >> e.shift;
    const bool first = sequence == from.sequence && index == from.unit;
    const bool last = sequence == to.sequence && index == to.unit;
    unit.from = first ? from.token : 0;
    unit.to = last ? to.token : 0x7fffffff;
    unit.shared_index = first && from.token > 0 ? from.leader : (last ? to.leader : -1);
    token = max(unit.from, unit.begin) & ~(tokens - 1);
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_WORK_CUH_
