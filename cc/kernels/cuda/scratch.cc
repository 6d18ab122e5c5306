#include "kernels/cuda/scratch.h"

#include <algorithm>

namespace kvpage::cuda {

namespace {

std::size_t Aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }  // alignment of arrays

// Places arrays one after the other, starting at `*end` bytes.
class Placer {
 public:
  explicit Placer(std::size_t* end) : end_(end) {}
  std::size_t operator()(std::size_t size, std::int64_t count) const {
    const std::size_t here = *end_;
    *end_ += Aligned(static_cast<std::size_t>(count) * size);
    return here;
  }

 private:
  std::size_t* const end_;
};

}  // namespace

std::size_t MarksOffset(std::int64_t num_sequences) {
  return Aligned(sizeof(CheckedBatch) + static_cast<std::size_t>(num_sequences) * sizeof(Sequence));
}

std::size_t CheckedBytes(std::int64_t num_sequences, std::int64_t max_slots) {
  const std::int64_t marks = max_slots > kSharedMarks ? max_slots : 0;
  return MarksOffset(num_sequences) + Aligned(static_cast<std::size_t>(marks) * sizeof(std::uint32_t));
}

bool HasTensorCoreKernels(const AttentionOperands& a) {
  // Tensor cores multiply weights in the type of the queries.
  return !a.options.exact_weights && (a.q_dtype == a.kv_dtype || IsQuantized(a.kv_dtype)) &&
         (a.q_dtype == DType::kBF16 || a.q_dtype == DType::kF16) &&
         (a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256);
}

bool CanGroup(const AttentionOperands& a, std::int64_t num_sequences) {
  if (!HasTensorCoreKernels(a) || IsQuantized(a.kv_dtype) || a.num_q_heads / a.num_kv_heads > kTileRows) return false;
  // At best, all sequences but one leave all of their keys and values to a group.
  const std::int64_t most = std::int64_t{4} * a.head_dim * a.num_kv_heads * a.max_context * (num_sequences - 1);
  return num_sequences > 1 && most >= a.least_saved_bytes;
}

AttentionScratch LayOut(const AttentionOperands& a, std::int64_t num_sequences, std::int64_t num_tokens,
                        bool tensor_cores, int blocks) {
  AttentionScratch at;
  const std::int64_t context = std::max<std::int64_t>(a.max_context, 1);
  const std::int64_t group = a.num_q_heads / a.num_kv_heads;
  // A split unit has at most kTileRows rows, there are at most as many split units as blocks, and no row of the batch
  // is in two of them.
  const std::int64_t rows = std::min<std::int64_t>(num_tokens * a.num_q_heads, std::int64_t{blocks} * kTileRows);
  at.partials_per_row = static_cast<std::int32_t>(std::min<std::int64_t>(kMaxSpans, (context >> kSpanShift) + 2));
  const std::int64_t units = std::min<std::int64_t>(
      (num_tokens * group / PrefillRows(a.head_dim) + num_sequences) * a.num_kv_heads, kMaxPrefillStates);
  const std::int64_t spans = std::min<std::int64_t>(kMaxPrefillSpans, (context >> kPrefillSpanShift) + 2);
  // At least one state per block, for the spans of its current unit.
  const std::int64_t states = std::max<std::int64_t>(std::min<std::int64_t>(units * spans, kMaxPrefillStates), blocks);
  const bool prefill = tensor_cores && HasPrefillKernel(a.kv_dtype) && context > (1 << kPrefillSpanShift);
  at.max_prefill_states = prefill ? static_cast<std::int32_t>(states) : 0;

  const bool grouped = tensor_cores && CanGroup(a, num_sequences);
  at.max_prefix_rows =
      grouped ? static_cast<std::int32_t>(std::min<std::int64_t>(num_tokens * a.num_q_heads, kMaxPrefixRows)) : 0;

  at.bytes = CheckedBytes(num_sequences, a.max_slots);
  const Placer take(&at.bytes);
  at.num_counters = 1 + std::int64_t{blocks} + at.max_prefill_states;
  at.counters = take(sizeof(std::int32_t), at.num_counters);
  at.partial_values = take(sizeof(float), rows * at.partials_per_row * a.head_dim);
  at.partial_sums = take(2 * sizeof(float), rows * at.partials_per_row);
  at.prefill_states = take(sizeof(float), at.max_prefill_states * PrefillStateFloats(a.head_dim));
  const std::int64_t prefix_states = std::int64_t{at.max_prefix_rows} * at.partials_per_row;
  at.prefix_values = take(sizeof(float), prefix_states * a.head_dim);
  at.prefix_sums = take(2 * sizeof(float), prefix_states);
  return at;
}

PlanLayout LayOutPlan(std::int64_t num_sequences, int blocks) {
  PlanLayout at;
  const Placer take(&at.bytes);
  at.counts = take(sizeof(PlanCounts), 1);
  at.decode_sequences = take(sizeof(Sequence), num_sequences);
  at.prefill_sequences = take(sizeof(Sequence), num_sequences);
  at.cost_prefix = take(sizeof(std::int64_t), num_sequences + 1);
  at.unit_prefix = take(sizeof(std::int32_t), num_sequences + 1);
  at.state_prefix = take(sizeof(std::int32_t), num_sequences + 1);
  at.split_points = take(sizeof(SplitPoint), blocks + 1);
  at.split_units = take(sizeof(SplitUnit), blocks);
  at.prefix_spans = take(sizeof(std::int32_t), num_sequences);
  at.prefix_rows = take(sizeof(std::int32_t), num_sequences);
  at.prefix_groups = take(sizeof(PrefixGroup), num_sequences * kGroupLevels);
  at.members = take(sizeof(std::int32_t), num_sequences * kGroupLevels);
  at.prefix_states = take(sizeof(PrefixState), num_sequences);
  return at;
}

std::size_t PlanBytes(std::int64_t num_sequences) { return LayOutPlan(num_sequences, kBlocksPerSm * kMaxSms).bytes; }

std::size_t AttentionBytes(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens) {
  return LayOut(attention, num_sequences, num_tokens, HasTensorCoreKernels(attention), kBlocksPerSm * kMaxSms).bytes;
}

}  // namespace kvpage::cuda
