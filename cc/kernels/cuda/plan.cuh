// The planner: one block shares out the work of a batch.
#ifndef KVPAGE_KERNELS_CUDA_PLAN_CUH_
#define KVPAGE_KERNELS_CUDA_PLAN_CUH_

#include <cstdint>

#include "kernels/cuda/check.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

inline constexpr int kPlanThreads = kCheckThreads;  // the check's block goes on as the planner

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

// Tiles of 64 tokens that a unit reads, and something for beginning it.
__device__ __forceinline__ std::int64_t UnitCost(const Extent& e) { return (e.end - 1) / 64 - e.begin / 64 + 2; }

// Packs the active sequences into the plan's lists, with the cost of those before each.
__device__ inline void PlanSequences(const AttentionParams& p, std::int64_t* total_cost) {
  const CheckedBatch& checked = *p.checked;
  const Plan& plan = p.plan;
  std::int64_t few = 0, many = 0, cost_before = 0, units_before = 0, states_before = 0;
  for (std::int32_t base = 0; base < p.num_sequences; base += kPlanThreads) {
    const std::int32_t index = base + static_cast<std::int32_t>(threadIdx.x);
    Sequence s;
    s.slot = -1;
    if (index < p.num_sequences) s = checked.sequences()[index];
    const bool active = s.slot >= 0 && s.query_length > 0;
    const bool is_few = active && std::int64_t{s.query_length} * p.group <= p.few_rows;
    const bool is_many = active && !is_few;
    std::int64_t cost = 0, units = 0, states = 0;
    if (is_few) {
      const Extent e = FewExtent(s, checked.sliding_window, p.group);
      cost = UnitCost(e) * e.tiles * p.num_kv_heads;
    } else if (is_many) {
      const Extent e = PrefillExtent(s, checked.sliding_window, p);
      units = std::int64_t{e.tiles} * p.num_kv_heads;
      states = units * NumSpans(e);
    }
    std::int64_t num_few, num_many, all_cost, all_units, all_states;
    const std::int64_t at_few = few + SumBefore(is_few ? 1 : 0, &num_few);
    const std::int64_t at_many = many + SumBefore(is_many ? 1 : 0, &num_many);
    const std::int64_t at_cost = cost_before + SumBefore(cost, &all_cost);
    const std::int64_t at_units = units_before + SumBefore(units, &all_units);
    const std::int64_t at_states = states_before + SumBefore(states, &all_states);
    if (is_few) {
      plan.few[at_few] = s;
      plan.prefix[at_few] = at_cost;
    } else if (is_many) {
      plan.many[at_many] = s;
      plan.items[at_many] = static_cast<std::int32_t>(at_units);
      plan.states[at_many] = static_cast<std::int32_t>(at_states);
    }
    few += num_few;
    many += num_many;
    cost_before += all_cost;
    units_before += all_units;
    states_before += all_states;
  }
  if (threadIdx.x == 0) {
    PlanCounts counts = {};
    counts.few = static_cast<std::int32_t>(few);
    counts.many = static_cast<std::int32_t>(many);
    // One span at a time where units alone would leave blocks idle and their states fit.
    counts.split = units_before < 2 * p.blocks && states_before <= p.prefill_slots && states_before > units_before;
    counts.items = static_cast<std::int32_t>(counts.split != 0 ? states_before : units_before);
    *plan.counts = counts;
    plan.prefix[few] = cost_before;
    plan.items[many] = static_cast<std::int32_t>(units_before);
    plan.states[many] = static_cast<std::int32_t>(states_before);
  }
  for (int i = threadIdx.x; i < p.prefill_slots; i += kPlanThreads) plan.arrived[i] = 0;
  *total_cost = cost_before;
}

// Where on the line the cost before is `cost`, moved to the nearest start of a span.
__device__ inline Cut FindCut(const AttentionParams& p, std::int64_t cost, std::int64_t total) {
  const Plan& plan = p.plan;
  const std::int32_t count = plan.counts->few;
  if (cost >= total) return {count, 0, 0, -1};
  std::int32_t low = 0, high = count;
  while (high - low > 1) {
    const std::int32_t middle = (low + high) / 2;
    (plan.prefix[middle] <= cost ? low : high) = middle;
  }
  const Sequence s = plan.few[low];
  const Extent e = FewExtent(s, p.checked->sliding_window, p.group);
  const std::int64_t unit_cost = UnitCost(e), local = cost - plan.prefix[low];
  Cut cut = {low, static_cast<std::int32_t>(local / unit_cost), 0, -1};
  if (local % unit_cost == 0) return cut;
  const std::int64_t position = (e.begin / 64 + local % unit_cost) * 64;
  const std::int64_t token = ((position + (std::int64_t{1} << e.shift >> 1)) >> e.shift) << e.shift;
  // Inside what all tiles of rows see, so that no piece of a unit is empty.
  const std::int32_t window = p.checked->sliding_window;
  const std::int32_t begin = FirstVisible(s.position + (e.tiles - 1) * kTileRows / p.group, window);
  const std::int32_t end = s.position + min((kTileRows - 1) / p.group + 1, s.query_length);
  if (token > begin && token < end) {
    cut.token = static_cast<std::int32_t>(token);
  } else if (token > begin && ++cut.unit == e.tiles * p.num_kv_heads) {
    cut.unit = 0;
    ++cut.sequence;
  }
  return cut;
}

__device__ inline void PlanCuts(const AttentionParams& p, std::int64_t total) {
  const Plan& plan = p.plan;
  for (int i = threadIdx.x; i <= p.blocks; i += kPlanThreads) plan.cuts[i] = FindCut(p, total * i / p.blocks, total);
  __syncthreads();
  const auto same_unit = [&](const Cut& a, const Cut& b) { return a.sequence == b.sequence && a.unit == b.unit; };
  std::int64_t first_row = 0;
  for (int base = 0; base < p.blocks; base += kPlanThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    std::int32_t rows = 0;
    Shared shared = {};
    if (i < p.blocks && plan.cuts[i].token > 0) {
      const Cut cut = plan.cuts[i];
      int leader = i;
      while (leader > 0 && plan.cuts[leader - 1].token > 0 && same_unit(plan.cuts[leader - 1], cut)) --leader;
      plan.cuts[i].leader = leader;
      if (leader == i) {
        shared.pieces = 2;
        shared.token = cut.token;
        std::int32_t token = cut.token;
        for (int next = i + 1; next < p.blocks; ++next) {
          const Cut other = plan.cuts[next];
          if (other.token == 0 || !same_unit(other, cut)) break;
          if (other.token != token) ++shared.pieces;
          token = other.token;
        }
        const Sequence s = plan.few[cut.sequence];
        const std::int64_t all = std::int64_t{s.query_length} * p.group;
        const std::int64_t tiles = (all + kTileRows - 1) / kTileRows;
        const std::int64_t before = (tiles - 1 - cut.unit / p.num_kv_heads) * kTileRows;
        rows = static_cast<std::int32_t>(min(std::int64_t{kTileRows}, all - before));
      }
    }
    std::int64_t all_rows;
    const std::int64_t at = first_row + SumBefore(rows, &all_rows);
    if (rows > 0) {
      shared.first_row = static_cast<std::int32_t>(at);
      plan.shared[i] = shared;
    }
    first_row += all_rows;
  }
}

// All of it, by the threads of one block, which have seen the check's end.
__device__ inline void PlanBatch(const AttentionParams& p) {
  if (p.checked->ok == 0) {
    if (threadIdx.x == 0) *p.plan.counts = {};
    return;
  }
  std::int64_t total = 0;
  PlanSequences(p, &total);
  __syncthreads();
  PlanCuts(p, total);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PLAN_CUH_
