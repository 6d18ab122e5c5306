// How much scratch memory ops take, and what lies where in it. No CUDA in here: every build compiles this, because a
// program can be lowered for CUDA on any machine and must say then how much it will want.
#ifndef KVPAGE_KERNELS_CUDA_SCRATCH_H_
#define KVPAGE_KERNELS_CUDA_SCRATCH_H_

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "kernels/cuda/kernels.h"

namespace kvpage::cuda {

// Multiprocessors that attention makes use of: more than any card has today. Scratch is laid out for so many, so that
// its size depends on shapes only.
inline constexpr int kMaxSms = 192;

inline constexpr int kThreads = 128;  // of a block of every attention kernel
inline constexpr int kBlocksPerSm = 2;
inline constexpr int kTileRows = 16;

// Spans of decode: 256 tokens, more where there would be more than kMaxSpans of them.
inline constexpr int kSpanShift = 8;
inline constexpr int kMaxSpans = 64;
// Spans of prefill, whose states are large. A sequence that has kPlenty units by itself is not cut.
inline constexpr int kPrefillSpanShift = 10;
inline constexpr int kMaxPrefillSpans = 16;
inline constexpr int kPlenty = 256;
// States that prefill may leave in memory.
inline constexpr int kMaxPrefillStates = 1024;

// Rows of a tile of prefill: what the registers of a block's four warps hold.
KVPAGE_HOST_DEVICE constexpr int PrefillRows(int head_dim) { return head_dim > 128 ? 64 : 128; }

// A state of prefill: weighted values, max and sum as the threads hold them. Every thread's part is its own, register
// by register.
KVPAGE_HOST_DEVICE constexpr std::int64_t PrefillStateFloats(int head_dim) {
  return std::int64_t{PrefillRows(head_dim)} * head_dim + std::int64_t{kThreads} * PrefillRows(head_dim) / 16;
}

// Where the piece of a block begins.
struct Cut {
  std::int32_t sequence;  // index in Plan::few.sequences
  std::int32_t unit;      // of the sequence
  std::int32_t token;     // 0: at the unit's start; else inside it, at the start of a span
  std::int32_t leader;    // first block that begins inside this unit; -1 when this one begins at a unit's start
};

// A unit that blocks share, at the index of its leader.
struct Shared {
  std::int32_t first_row;  // of its states
  std::int32_t pieces;
  std::int32_t finished;  // pieces that are done
  std::int32_t token;     // where the second piece begins; the first one leaves one state, folded
};

struct PlanCounts {
  std::int32_t few;    // sequences with few rows
  std::int32_t many;   // and with many
  std::int32_t items;  // of prefill
  std::int32_t split;  // whether an item is one span of a unit, not all of it
  std::int32_t next;   // first item that no block has taken
  std::int32_t unused[3];
};

// Whether the tensor core kernels serve these types and this head size.
bool HasTensorCoreKernels(const AttentionOperands& attention);

// Byte offsets of the arrays of a Plan (work.cuh) behind the CheckedBatch, and the numbers that decide their sizes.
struct AttentionScratch {
  std::int32_t span_slots = 0;
  std::int32_t prefill_slots = 0;
  std::size_t counts = 0, few = 0, many = 0, prefix = 0, items = 0, states = 0, cuts = 0, shared = 0, arrived = 0;
  std::size_t values = 0, sums = 0, prefill_states = 0;
  std::size_t bytes = 0;
};
// `blocks`: of every attention kernel's grid.
AttentionScratch LayOut(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                        bool tensor_cores, int blocks);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_SCRATCH_H_
