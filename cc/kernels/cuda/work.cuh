// Work units, and the plan that the planner (plan.cuh) writes and the attention kernels read.
//
// A work unit is a sequence, a KV head and a tile of rows; a row is one (query token, query head) pair. Its context is
// cut into spans at fixed positions that depend only on the sequence. Every span has its own softmax state (max, sum,
// weighted values). States are merged from left to right: by the block that computed them all or, if a unit is split
// among blocks, by the last of these blocks. Both use the same arithmetic, so the distribution of work over blocks
// never changes the result.
//
// Decode (sequences of at most kTileRows rows per KV head, and all sequences of the general kernel): units of
// neighbouring KV heads (heads_together) differ only in the head. The spans of all units of one such head form a work
// list, which is split into pieces of equal cost; neighbouring blocks take the same piece for each of those heads. Only
// units with a split point inside need partial states in memory. Prefill (all other sequences): blocks take work items
// from a queue, which are whole units or single spans.
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

// The planner's output.
struct Plan {
  PlanCounts* counts;
  Sequence* decode_sequences;   // [num_sequences], packed
  Sequence* prefill_sequences;  // [num_sequences]
  std::int64_t* cost_prefix;    // [num_sequences + 1] cost of the decode sequences before
  std::int32_t* unit_prefix;    // [num_sequences + 1] units of the prefill sequences before
  std::int32_t* state_prefix;   // [num_sequences + 1] spans of those units
  SplitPoint* split_points;     // [pieces + 1], in the decode work list
  SplitUnit* split_units;       // [pieces * heads_together]
  // For each decode sequence: how many of its first spans are computed by groups, and the index of its first row in
  // CallState::prefix_values, whose rows are ordered by KV head.
  std::int32_t* prefix_spans;  // [num_sequences]
  std::int32_t* prefix_rows;   // [num_sequences]
  PrefixGroup* groups;         // [kGroupLevels * num_sequences]
  std::int32_t* members;       // [kGroupLevels * num_sequences] decode sequences
  PrefixState* prefix_states;  // [num_sequences], only used while searching for groups
};

// State shared by the attention kernels of one call. The counters are zero when the kernels start.
struct CallState {
  std::int32_t* next_item;  // the next prefill item for a block to take
  std::int32_t* finished;   // [blocks] finished items of each split decode unit
  std::int32_t* arrived;    // [max_prefill_states] finished items of each prefill unit
  std::int32_t num_counters;
  float* partial_values;  // [rows, partials_per_row, head_dim], for decode
  float2* partial_sums;   // [rows, partials_per_row] max and sum
  float* prefill_states;  // [max_prefill_states, PrefillStateFloats]
  float* prefix_values;   // [max_prefix_rows, partials_per_row, head_dim] states of spans computed by groups
  float2* prefix_sums;    // [max_prefix_rows, partials_per_row]

  __device__ __forceinline__ void ZeroCounters() const {
    for (std::int32_t i = threadIdx.x; i < num_counters; i += blockDim.x) next_item[i] = 0;
  }
};

// Parameters of every attention kernel.
struct AttentionParams {
  const CheckedBatch* checked;
  Plan plan;
  CallState state;
  const void* q;
  void* out;
  float* lse;                // null if not wanted
  AttentionOptions options;  // the window is copied to the CheckedBatch, and kernels read it there
  std::int64_t num_tokens;
  std::int32_t num_sequences;
  std::int32_t num_q_heads;
  std::int32_t num_kv_heads;
  std::int32_t group;
  std::int32_t head_dim;
  std::int32_t decode_rows;   // sequences with more rows per KV head go to prefill
  std::int32_t prefill_rows;  // per prefill tile
  std::int32_t blocks;        // grid size of every attention kernel
  std::int32_t heads_together;
  std::int32_t pieces;  // of the decode work list: blocks / heads_together
  std::int32_t partials_per_row;
  std::int32_t max_prefill_states;
  std::int32_t max_prefix_rows;  // 0 if nothing is grouped
  std::int32_t group_rows;       // that a block processes at a time for a group
  std::int64_t least_saved;      // bytes that groups must save
  std::int32_t stages;           // pipeline stages
  std::int32_t tile_tokens;      // general.cuh
  std::int32_t row_stride;       // general.cuh: bytes per key in shared memory
  DType q_dtype;
  bool last;  // no other kernel of the op follows
};

// The positions that the rows of a sequence see, and how they are divided.
struct Extent {
  std::int32_t begin, end;  // positions that any row sees
  std::int32_t tiles;       // of rows
  std::int32_t shift;       // spans are 1 << shift tokens
};

__device__ __forceinline__ std::int32_t FirstVisible(std::int32_t position, std::int32_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// For a set of rows: positions [begin, end) that any row sees, and [all_begin, all_end) that all rows see.
struct VisibleRange {
  std::int32_t begin, end, all_begin, all_end;

  // For rows whose query tokens are at positions `first` to `last`.
  __device__ __forceinline__ static VisibleRange Of(std::int32_t first, std::int32_t last, std::int32_t window) {
    return {FirstVisible(first, window), last + 1, FirstVisible(last, window), first + 1};
  }
  // Whether the rows see different subsets of the `count` tokens that start at `token`.
  __device__ __forceinline__ bool Mixed(std::int32_t token, int count) const {
    return token < all_begin || token + count > all_end;
  }
};

__device__ __forceinline__ int SpanShift(std::int32_t tokens, int shift, int max_spans) {
  // Leaves room for one more span, because the first one may start before the context does.
  while (tokens > (std::int64_t{max_spans - 1} << shift)) ++shift;
  return shift;
}

__device__ __forceinline__ Extent DecodeExtent(const Sequence& s, std::int32_t window, std::int32_t group) {
  Extent e;
  e.begin = FirstVisible(s.position, window);
  e.end = s.position + s.query_length;
  e.tiles = static_cast<std::int32_t>((std::int64_t{s.query_length} * group + kTileRows - 1) / kTileRows);
  e.shift = SpanShift(e.end - e.begin, kSpanShift, kMaxSpans);
  return e;
}

// The same without the first spans, which groups compute.
__device__ __forceinline__ Extent OwnExtent(const Sequence& s, std::int32_t window, std::int32_t group,
                                            std::int32_t prefix_spans) {
  Extent e = DecodeExtent(s, window, group);
  e.begin = max(e.begin, prefix_spans << e.shift);
  return e;
}

__device__ __forceinline__ Extent PrefillExtent(const Sequence& s, std::int32_t window, const AttentionParams& p) {
  Extent e;
  e.begin = FirstVisible(s.position, window);
  e.end = s.position + s.query_length;
  e.tiles = static_cast<std::int32_t>((std::int64_t{s.query_length} * p.group + p.prefill_rows - 1) / p.prefill_rows);
  e.shift = std::int64_t{e.tiles} * p.num_kv_heads >= kEnoughUnits
                ? 30
                : SpanShift(e.end - e.begin, kPrefillSpanShift, kMaxPrefillSpans);
  return e;
}

__device__ __forceinline__ int NumSpans(const Extent& e) { return ((e.end - 1) >> e.shift) - (e.begin >> e.shift) + 1; }

// A work unit, and the part of it (the item) that a block works on.
struct WorkUnit {
  Sequence sequence;
  std::int32_t head;
  std::int32_t first_row;  // row r of the tile belongs to query token (first_row + r) / group
  std::int32_t rows;
  std::int32_t begin, end;  // positions that any row of the tile sees, without those computed by a group
  std::int32_t shift;
  std::int32_t prefix;       // number of the sequence's first spans that are computed by a group
  std::int32_t from, to;     // the item: [max(from, begin), min(to, end))
  std::int32_t first_span;   // of the sequence; partial states are numbered from it
  std::int32_t split_index;  // in Plan::split_units; -1: this block computes the whole unit
};

// Finds the piece of the work list that this block works on; returns false if there is none.
__device__ __forceinline__ bool FindPiece(const AttentionParams& p, SplitPoint* from, SplitPoint* to) {
  const auto piece = static_cast<std::int32_t>(blockIdx.x) / p.heads_together;
  if (piece >= p.pieces) return false;
  *from = p.plan.split_points[piece];
  *to = p.plan.split_points[piece + 1];
  return true;
}

// Iterates over a block's piece of the work list in tiles of `tokens` tokens, a power of two up to 128. All threads
// hold the same state. kGroups: the kernel runs after one that computes groups (grouped.cuh).
template <bool kGroups>
struct WorkIterator {
  WorkUnit unit;
  std::int32_t token;  // start of the tile, a multiple of its size
  bool done;
  std::int32_t sequence, index, units;

  __device__ __forceinline__ bool FirstTile() const { return token <= max(unit.from, unit.begin); }
  __device__ __forceinline__ std::int32_t ItemEnd() const { return min(unit.to, unit.end); }

  __device__ __forceinline__ void Start(const AttentionParams& p, const SplitPoint& from, const SplitPoint& to,
                                        int tokens) {
    sequence = from.sequence;
    index = from.unit;
    done = from.sequence == to.sequence && from.unit == to.unit && from.token == to.token;
    if (!done) Enter(p, from, to, tokens);
  }

  __device__ __forceinline__ void Next(const AttentionParams& p, const SplitPoint& from, const SplitPoint& to,
                                       int tokens) {
    token += tokens;
    if (token < ItemEnd()) return;
    if (++index == units) {
      index = 0;
      ++sequence;
    }
    done =
        sequence > to.sequence || (sequence == to.sequence && (index > to.unit || (index == to.unit && to.token == 0)));
    if (!done) Enter(p, from, to, tokens);
  }

  __device__ __forceinline__ void Enter(const AttentionParams& p, const SplitPoint& from, const SplitPoint& to,
                                        int tokens) {
    unit.sequence = p.plan.decode_sequences[sequence];
    const std::int32_t window = p.checked->sliding_window;
    unit.prefix = kGroups && p.checked->groups_hold != 0 ? p.plan.prefix_spans[sequence] : 0;
    const Extent e = DecodeExtent(unit.sequence, window, p.group);
    const std::int32_t groups = p.num_kv_heads / p.heads_together;
    const std::int32_t head = static_cast<std::int32_t>(blockIdx.x) % p.heads_together;
    units = e.tiles * groups;
    // The last rows first, because they have the longest context.
    const std::int32_t tile = e.tiles - 1 - index / groups;
    unit.head = index % groups * p.heads_together + head;
    unit.first_row = tile * kTileRows;
    unit.rows = static_cast<std::int32_t>(
        min(std::int64_t{kTileRows}, std::int64_t{unit.sequence.query_length} * p.group - unit.first_row));
    unit.begin = max(FirstVisible(unit.sequence.position + unit.first_row / p.group, window), unit.prefix << e.shift);
    unit.end = unit.sequence.position + (unit.first_row + unit.rows - 1) / p.group + 1;
    unit.shift = e.shift;
    unit.first_span = max(e.begin >> e.shift, unit.prefix);
    const bool first = sequence == from.sequence && index == from.unit;
    const bool last = sequence == to.sequence && index == to.unit;
    unit.from = first ? from.token : 0;
    unit.to = last ? to.token : 0x7fffffff;
    const std::int32_t leader = first && from.token > 0 ? from.leader : (last ? to.leader : -1);
    unit.split_index = leader < 0 ? -1 : leader * p.heads_together + head;
    token = max(unit.from, unit.begin) & ~(tokens - 1);
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_WORK_CUH_
