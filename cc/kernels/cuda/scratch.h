// Size and layout of the scratch memory of ops. Independent of CUDA and compiled in every build, because a program can
// be lowered for CUDA on any machine, and its scratch size must be known then.
#ifndef KVPAGE_KERNELS_CUDA_SCRATCH_H_
#define KVPAGE_KERNELS_CUDA_SCRATCH_H_

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/plan_counts.h"

namespace kvpage::cuda {

// The most multiprocessors that attention uses, more than any current GPU has. Scratch memory is laid out for this
// number, so that its size depends on shapes only.
inline constexpr int kMaxSms = 192;

inline constexpr int kThreads = 128;  // per block of every attention kernel
inline constexpr int kBlocksPerSm = 2;
inline constexpr int kTileRows = 16;

// Decode spans have 256 tokens, or more if a sequence would have more than kMaxSpans spans.
inline constexpr int kSpanShift = 8;
inline constexpr int kMaxSpans = 64;
// Prefill spans are longer because their states are large. A sequence with at least kEnoughUnits units has a single
// span.
inline constexpr int kPrefillSpanShift = 10;
inline constexpr int kMaxPrefillSpans = 16;
inline constexpr int kEnoughUnits = 256;
// At most this many prefill states are in memory.
inline constexpr int kMaxPrefillStates = 1024;

// Rows per prefill tile: as many as fit into the registers of a block's four warps.
KVPAGE_HOST_DEVICE constexpr int PrefillRows(int head_dim) { return head_dim > 128 ? 64 : 128; }

// A prefill state in memory: weighted values, max and sum in the order of the threads' registers.
KVPAGE_HOST_DEVICE constexpr std::int64_t PrefillStateFloats(int head_dim) {
  return std::int64_t{PrefillRows(head_dim)} * head_dim + std::int64_t{kThreads} * PrefillRows(head_dim) / 16;
}

// KV heads whose blocks are neighbours in the grid and process the same tokens at the same time. Together they read
// full tokens, so that pages and DRAM rows are opened once. A divisor of num_kv_heads that leaves few of the blocks
// without work.
constexpr int HeadsTogether(int num_kv_heads, int blocks) {
  for (int heads = 8; heads > 1; --heads) {
    if (num_kv_heads % heads == 0 && blocks % heads * 32 <= blocks) return heads;
  }
  return 1;
}

// Start of a piece of the decode work list.
struct SplitPoint {
  std::int32_t sequence;  // index in Plan::decode_sequences
  std::int32_t unit;      // within the sequence: a tile of rows and HeadsTogether KV heads
  std::int32_t token;     // 0 at the start of the unit, otherwise the start of a span inside it
  std::int32_t leader;    // first piece that begins inside this unit; -1 if this one begins at the unit's start
};

// One KV head of a unit that several blocks work on, at index leader * HeadsTogether + head.
struct SplitUnit {
  std::int32_t first_row;  // of the unit's partial states
  std::int32_t items;
  std::int32_t token;  // start of the second item; the first item stores one merged state
};

// Decode sequences that share physical memory from their beginning on, and the spans that are computed once for all of
// them (grouped.cuh). Nested groups come later in the list. A work item is one span and as many members as a block
// processes at a time.
struct PrefixGroup {
  std::int32_t first;  // index in Plan::members
  std::int32_t count;
  std::int32_t span_begin, span_end;
  std::int32_t items;  // items of the preceding groups, per KV head
};

// State of a decode sequence while the planner searches for groups (prefix_groups.cuh).
struct PrefixState {
  std::int32_t leader;  // sequences with equal `leader` and `spans` share these spans
  std::int32_t spans;
  std::int32_t most;  // spans that may be shared
  std::int32_t kind;  // query tokens and span length; only sequences of the same kind are grouped
  std::int32_t next_leader, next_spans, end;
};

// Depth of nested groups.
inline constexpr int kGroupLevels = 4;
// At most this many rows of shared-span states are in memory. Further sequences are not grouped.
inline constexpr int kMaxPrefixRows = 4096;

// Whether the tensor core kernels support these types and this head size.
bool HasTensorCoreKernels(const AttentionOperands& attention);
// Whether prefill has a kernel for this storage type; if not, decode kernels are used.
inline bool HasPrefillKernel(DType storage) { return !IsQuantized(storage); }

// Byte offsets of a Plan's arrays (work.cuh). A plan depends on the batch's lengths, slots, offsets and window, and on
// what the slots share.
struct PlanLayout {
  std::size_t counts = 0, decode_sequences = 0, prefill_sequences = 0, cost_prefix = 0, unit_prefix = 0,
              state_prefix = 0, split_points = 0, split_units = 0, prefix_spans = 0, prefix_rows = 0, prefix_groups = 0,
              members = 0, prefix_states = 0;
  std::size_t bytes = 0;
};
// `blocks`: grid size of every attention kernel.
PlanLayout LayOutPlan(std::int64_t num_sequences, int blocks);

// Byte offsets of an op's scratch memory after the CheckedBatch, and sizes that are not obvious.
struct AttentionScratch {
  std::int32_t partials_per_row = 0;
  std::int32_t max_prefill_states = 0;
  std::int32_t max_prefix_rows = 0;
  std::int64_t num_counters = 0;
  std::size_t counters = 0, partial_values = 0, partial_sums = 0, prefill_states = 0, prefix_values = 0,
              prefix_sums = 0;
  std::size_t bytes = 0;
};
AttentionScratch LayOut(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                        bool tensor_cores, int blocks);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_SCRATCH_H_
