// The planner: one block distributes the work of a batch over the grid of the attention kernels.
#ifndef KVPAGE_KERNELS_CUDA_PLAN_CUH_
#define KVPAGE_KERNELS_CUDA_PLAN_CUH_

#include <cstdint>

#include "kernels/cuda/prefix_groups.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// The number of 64-token tiles that a unit reads, plus the cost of starting it.
__device__ __forceinline__ std::int64_t UnitCost(const Extent& e) { return (e.end - 1) / 64 - e.begin / 64 + 2; }

// Packs the active sequences into the plan's lists, with prefix sums of their costs. sequence_at(index) returns a
// Sequence.
template <class SequenceAt>
__device__ inline void PlanSequences(const AttentionParams& p, std::int32_t window, const SequenceAt& sequence_at,
                                     std::int64_t* total_cost) {
  const Plan& plan = p.plan;
  // Decode in the lower half, prefill in the upper half, so that a single prefix sum serves both.
  std::int64_t sequences_before = 0;
  std::int64_t cost_before = 0, units_before = 0, states_before = 0;
  for (std::int32_t base = 0; base < p.num_sequences; base += kPlanThreads) {
    const std::int32_t index = base + static_cast<std::int32_t>(threadIdx.x);
    Sequence s;
    s.slot = -1;
    if (index < p.num_sequences) s = sequence_at(index);
    const bool active = s.slot >= 0 && s.query_length > 0;
    const bool is_decode = active && std::int64_t{s.query_length} * p.group <= p.decode_rows;
    const bool is_prefill = active && !is_decode;
    std::int64_t cost = 0, units = 0, states = 0, all;
    if (is_decode) {
      const Extent e = DecodeExtent(s, window, p.group);
      cost = UnitCost(e) * e.tiles * (p.num_kv_heads / p.heads_together);
    } else if (is_prefill) {
      const Extent e = PrefillExtent(s, window, p);
      units = std::int64_t{e.tiles} * p.num_kv_heads;
      states = units * NumSpans(e);
    }
    const std::int64_t mine = is_decode ? 1 : (is_prefill ? std::int64_t{1} << 32 : 0);
    const std::int64_t at = sequences_before + SumBefore(mine, &all);
    const auto at_decode = static_cast<std::int32_t>(at), at_prefill = static_cast<std::int32_t>(at >> 32);
    sequences_before += all;
    // Store each number as soon as it is computed; keeping them all in registers until the end would spill.
    if (is_decode) {
      plan.decode_sequences[at_decode] = s;
      plan.prefix_spans[at_decode] = 0;
    } else if (is_prefill) {
      plan.prefill_sequences[at_prefill] = s;
    }
    const std::int64_t at_cost = cost_before + SumBefore(cost, &all);
    cost_before += all;
    if (is_decode) plan.cost_prefix[at_decode] = at_cost;
    const std::int64_t at_units = units_before + SumBefore(units, &all);
    units_before += all;
    if (is_prefill) plan.unit_prefix[at_prefill] = static_cast<std::int32_t>(at_units);
    const std::int64_t at_states = states_before + SumBefore(states, &all);
    states_before += all;
    if (is_prefill) plan.state_prefix[at_prefill] = static_cast<std::int32_t>(at_states);
  }
  if (threadIdx.x == 0) {
    PlanCounts counts = {};
    const auto decode = static_cast<std::int32_t>(sequences_before);
    const auto prefill = static_cast<std::int32_t>(sequences_before >> 32);
    counts.decode = decode;
    counts.prefill = prefill;
    // Items are single spans if whole units would leave blocks idle and the states fit in memory.
    counts.split = units_before < 2 * p.blocks && states_before <= p.max_prefill_states && states_before > units_before;
    counts.items = static_cast<std::int32_t>(counts.split != 0 ? states_before : units_before);
    *plan.counts = counts;
    plan.cost_prefix[decode] = cost_before;
    plan.unit_prefix[prefill] = static_cast<std::int32_t>(units_before);
    plan.state_prefix[prefill] = static_cast<std::int32_t>(states_before);
  }
  *total_cost = cost_before;
}

// Replaces the costs with those of the spans that sequences compute themselves, outside of groups.
__device__ inline void CountOwnCosts(const AttentionParams& p, std::int32_t window, std::int64_t* total_cost) {
  const std::int32_t count = p.plan.counts->decode;
  std::int64_t before = 0;
  for (std::int32_t base = 0; base < count; base += kPlanThreads) {
    const std::int32_t i = base + static_cast<std::int32_t>(threadIdx.x);
    std::int64_t cost = 0, all;
    if (i < count) {
      const Extent e = OwnExtent(p.plan.decode_sequences[i], window, p.group, p.plan.prefix_spans[i]);
      cost = UnitCost(e) * e.tiles * (p.num_kv_heads / p.heads_together);
    }
    const std::int64_t at = before + SumBefore(cost, &all);
    if (i < count) p.plan.cost_prefix[i] = at;
    before += all;
  }
  if (threadIdx.x == 0) p.plan.cost_prefix[count] = before;
  *total_cost = before;
}

// The point of the work list that has this cost before it, rounded to the nearest start of a span.
__device__ inline SplitPoint FindSplitPoint(const AttentionParams& p, std::int32_t window, std::int64_t cost,
                                            std::int64_t total) {
  const Plan& plan = p.plan;
  const std::int32_t count = plan.counts->decode;
  if (cost >= total) return {count, 0, 0, -1};
  std::int32_t low = 0, high = count;
  while (high - low > 1) {
    const std::int32_t middle = (low + high) / 2;
    (plan.cost_prefix[middle] <= cost ? low : high) = middle;
  }
  const Sequence s = plan.decode_sequences[low];
  const Extent e = OwnExtent(s, window, p.group, plan.prefix_spans[low]);
  const std::int64_t unit_cost = UnitCost(e), local = cost - plan.cost_prefix[low];
  SplitPoint point = {low, static_cast<std::int32_t>(local / unit_cost), 0, -1};
  if (local % unit_cost == 0) return point;
  const std::int64_t position = (e.begin / 64 + local % unit_cost) * 64;
  const std::int64_t token = ((position + (std::int64_t{1} << e.shift >> 1)) >> e.shift) << e.shift;
  // Only if all tiles of rows see tokens on both sides, so that no item of a unit is empty.
  const std::int32_t begin = max(FirstVisible(s.position + (e.tiles - 1) * kTileRows / p.group, window), e.begin);
  const std::int32_t end = s.position + min((kTileRows - 1) / p.group + 1, s.query_length);
  if (token > begin && token < end) {
    point.token = static_cast<std::int32_t>(token);
  } else if (token > begin && ++point.unit == e.tiles * (p.num_kv_heads / p.heads_together)) {
    point.unit = 0;
    ++point.sequence;
  }
  return point;
}

__device__ inline void PlanSplits(const AttentionParams& p, std::int32_t window, std::int64_t total) {
  const Plan& plan = p.plan;
  const std::int32_t heads = p.heads_together, groups = p.num_kv_heads / heads;
  for (int i = threadIdx.x; i <= p.pieces; i += kPlanThreads)
    plan.split_points[i] = FindSplitPoint(p, window, total * i / p.pieces, total);
  __syncthreads();
  const auto same_unit = [&](const SplitPoint& a, const SplitPoint& b) {
    return a.sequence == b.sequence && a.unit == b.unit;
  };
  std::int64_t first_row = 0;
  for (int base = 0; base < p.pieces; base += kPlanThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    std::int32_t rows = 0;
    SplitUnit split = {};
    if (i < p.pieces && plan.split_points[i].token > 0) {
      const SplitPoint point = plan.split_points[i];
      int leader = i;
      while (leader > 0 && plan.split_points[leader - 1].token > 0 && same_unit(plan.split_points[leader - 1], point))
        --leader;
      plan.split_points[i].leader = leader;
      if (leader == i) {
        split.items = 2;
        split.token = point.token;
        std::int32_t token = point.token;
        for (int next = i + 1; next < p.pieces; ++next) {
          const SplitPoint other = plan.split_points[next];
          if (other.token == 0 || !same_unit(other, point)) break;
          if (other.token != token) ++split.items;
          token = other.token;
        }
        const Sequence s = plan.decode_sequences[point.sequence];
        const std::int64_t all = std::int64_t{s.query_length} * p.group;
        const std::int64_t tiles = (all + kTileRows - 1) / kTileRows;
        const std::int64_t before = (tiles - 1 - point.unit / groups) * kTileRows;
        rows = static_cast<std::int32_t>(min(std::int64_t{kTileRows}, all - before));
      }
    }
    std::int64_t all_rows;
    const std::int64_t at = first_row + SumBefore(std::int64_t{rows} * heads, &all_rows);
    for (std::int32_t head = 0; rows > 0 && head < heads; ++head) {
      split.first_row = static_cast<std::int32_t>(at) + head * rows;
      plan.split_units[i * heads + head] = split;
    }
    first_row += all_rows;
  }
}

// Makes the plan, with all threads of one block. `runs`: the blocks of sequences, which show common prefixes.
template <class SequenceAt>
__device__ inline void PlanBatch(const AttentionParams& p, std::int32_t window, const PrefixRuns& runs,
                                 const SequenceAt& sequence_at) {
  std::int64_t total = 0;
  PlanSequences(p, window, sequence_at, &total);
  __syncthreads();
  if (runs.blocks != nullptr && p.max_prefix_rows > 0 && PrefixFinder(p, window, runs).Run()) {
    __syncthreads();
    CountOwnCosts(p, window, &total);
    __syncthreads();
  }
  PlanSplits(p, window, total);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PLAN_CUH_
