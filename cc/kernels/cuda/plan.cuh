// The planner: one block distributes the work of a batch over the grid of the attention kernels.
#ifndef KVPAGE_KERNELS_CUDA_PLAN_CUH_
#define KVPAGE_KERNELS_CUDA_PLAN_CUH_

#include <cstdint>

#include "kernels/cuda/check.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

inline constexpr int kPlanThreads = kCheckThreads;  // the check's block continues as the planner

// Sum of `value` over the threads before this one; *total is that of all. Every thread must call it.
__device__ __forceinline__ std::int64_t SumBefore(std::int64_t value, std::int64_t* total) {
  KVPAGE_SHARED(std::int64_t[kPlanThreads / kWarpSize], warps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  std::int64_t sum = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const std::int64_t other = __shfl_up_sync(kFullMask, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) warps[warp] = sum;
  __syncthreads();
  std::int64_t before = 0, all = 0;
  for (int w = 0; w < kPlanThreads / kWarpSize; ++w) {
    if (w == warp) before = all;
    all += warps[w];
  }
  *total = all;
  return before + sum - value;
}

// The number of 64-token tiles that a unit reads, plus the cost of starting it.
__device__ __forceinline__ std::int64_t UnitCost(const Extent& e) { return (e.end - 1) / 64 - e.begin / 64 + 2; }

// Packs the active sequences into the plan's lists, with prefix sums of their costs. `sequence_at`: Sequence(index).
template <class SequenceAt>
__device__ inline void PlanSequences(const AttentionParams& p, std::int32_t window, const SequenceAt& sequence_at,
                                     std::int64_t* total_cost) {
  const Plan& plan = p.plan;
  std::int64_t decode = 0, prefill = 0, cost_before = 0, units_before = 0, states_before = 0;
  for (std::int32_t base = 0; base < p.num_sequences; base += kPlanThreads) {
    const std::int32_t index = base + static_cast<std::int32_t>(threadIdx.x);
    Sequence s;
    s.slot = -1;
    if (index < p.num_sequences) s = sequence_at(index);
    const bool active = s.slot >= 0 && s.query_length > 0;
    const bool is_decode = active && std::int64_t{s.query_length} * p.group <= p.decode_rows;
    const bool is_prefill = active && !is_decode;
    std::int64_t cost = 0, units = 0, states = 0;
    if (is_decode) {
      const Extent e = DecodeExtent(s, window, p.group);
      cost = UnitCost(e) * e.tiles * (p.num_kv_heads / p.heads_together);
    } else if (is_prefill) {
      const Extent e = PrefillExtent(s, window, p);
      units = std::int64_t{e.tiles} * p.num_kv_heads;
      states = units * NumSpans(e);
    }
    std::int64_t num_decode, num_prefill, all_cost, all_units, all_states;
    const std::int64_t at_decode = decode + SumBefore(is_decode ? 1 : 0, &num_decode);
    const std::int64_t at_prefill = prefill + SumBefore(is_prefill ? 1 : 0, &num_prefill);
    const std::int64_t at_cost = cost_before + SumBefore(cost, &all_cost);
    const std::int64_t at_units = units_before + SumBefore(units, &all_units);
    const std::int64_t at_states = states_before + SumBefore(states, &all_states);
    if (is_decode) {
      plan.decode_sequences[at_decode] = s;
      plan.cost_prefix[at_decode] = at_cost;
    } else if (is_prefill) {
      plan.prefill_sequences[at_prefill] = s;
      plan.unit_prefix[at_prefill] = static_cast<std::int32_t>(at_units);
      plan.state_prefix[at_prefill] = static_cast<std::int32_t>(at_states);
    }
    decode += num_decode;
    prefill += num_prefill;
    cost_before += all_cost;
    units_before += all_units;
    states_before += all_states;
  }
  if (threadIdx.x == 0) {
    PlanCounts counts = {};
    counts.decode = static_cast<std::int32_t>(decode);
    counts.prefill = static_cast<std::int32_t>(prefill);
    // Items are single spans where whole units would leave blocks idle and the states fit.
    counts.split = units_before < 2 * p.blocks && states_before <= p.max_prefill_states && states_before > units_before;
    counts.items = static_cast<std::int32_t>(counts.split != 0 ? states_before : units_before);
    *plan.counts = counts;
    plan.cost_prefix[decode] = cost_before;
    plan.unit_prefix[prefill] = static_cast<std::int32_t>(units_before);
    plan.state_prefix[prefill] = static_cast<std::int32_t>(states_before);
  }
  *total_cost = cost_before;
}

// The point of the work list with this cost before it, rounded to the nearest start of a span.
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
  const Extent e = DecodeExtent(s, window, p.group);
  const std::int64_t unit_cost = UnitCost(e), local = cost - plan.cost_prefix[low];
  SplitPoint point = {low, static_cast<std::int32_t>(local / unit_cost), 0, -1};
  if (local % unit_cost == 0) return point;
  const std::int64_t position = (e.begin / 64 + local % unit_cost) * 64;
  const std::int64_t token = ((position + (std::int64_t{1} << e.shift >> 1)) >> e.shift) << e.shift;
  // Only where all tiles of rows see tokens on both sides, so that no item of a unit is empty.
  const std::int32_t begin = FirstVisible(s.position + (e.tiles - 1) * kTileRows / p.group, window);
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

// Makes the plan, with all threads of one block.
template <class SequenceAt>
__device__ inline void PlanBatch(const AttentionParams& p, std::int32_t window, const SequenceAt& sequence_at) {
  std::int64_t total = 0;
  PlanSequences(p, window, sequence_at, &total);
  __syncthreads();
  PlanSplits(p, window, total);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PLAN_CUH_
