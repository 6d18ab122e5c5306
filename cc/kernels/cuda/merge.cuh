// Partial softmax states in memory, and their reduction for a unit that is split among several blocks.
#ifndef KVPAGE_KERNELS_CUDA_MERGE_CUH_
#define KVPAGE_KERNELS_CUDA_MERGE_CUH_

#include <cstdint>

#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Index of the partial state of a row and span. Index 0 of a row holds the merged spans of the first item.
__device__ __forceinline__ std::int64_t StateIndex(const AttentionParams& p, const WorkUnit& unit, std::int32_t row,
                                                   std::int32_t index) {
  return std::int64_t{p.plan.split_units[unit.split_index].first_row + row} * p.partials_per_row + index;
}

// Whether this block's item is the unit's first.
__device__ __forceinline__ bool IsFirstItem(const WorkUnit& unit) { return unit.from <= unit.begin; }

// Announces that this block has written its partial states of the unit; returns true in the last block. All threads
// must call it.
__device__ __forceinline__ bool Arrive(std::int32_t* finished, std::int32_t items) {
  KVPAGE_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1) == items - 1;
  __syncthreads();
  const bool mine = last;
  __threadfence();
  __syncthreads();
  return mine;
}

// Reduces the partial states of a split unit in span order and writes the output.
__device__ inline void MergeSplitUnit(const AttentionParams& p, const WorkUnit& unit) {
  const std::int32_t first = (p.plan.split_units[unit.split_index].token >> unit.shift) - unit.first_span;
  const std::int32_t end = ((unit.end - 1) >> unit.shift) - unit.first_span + 1;
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kColumns = 4;
  const float score_unit = ScoreUnit(p);
  for (std::int32_t row = threadIdx.x / kWarpSize; row < unit.rows; row += kWarps) {
    const std::int64_t state = StateIndex(p, unit, row, 0);
    const std::int64_t index = RowIndex(p, unit, row);
    const float* values = p.state.partial_values + state * p.head_dim;
    const float2* sums = p.state.partial_sums + state;
    for (std::int32_t base = 0; base < p.head_dim; base += kColumns * kWarpSize) {
      float2 sum = __ldcg(sums);
      float x[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const std::int32_t d = base + i * kWarpSize + lane;
        x[i] = d < p.head_dim ? __ldcg(values + d) : 0.0f;
      }
#pragma unroll 4
      for (std::int32_t span = first; span < end; ++span) {
        const float2 other = __ldcg(sums + span);
        const StateMerge merge(sum.x, sum.y, other.x, other.y, score_unit);
        sum.x = merge.max;
        sum.y = merge.sum;
        const float* from = values + std::int64_t{span} * p.head_dim;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const std::int32_t d = base + i * kWarpSize + lane;
          x[i] = merge(x[i], d < p.head_dim ? __ldcg(from + d) : 0.0f);
        }
      }
      const Normalization norm(p, RowHead(p, unit, row), sum.x, sum.y);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const std::int32_t d = base + i * kWarpSize + lane;
        if (d < p.head_dim) StoreElement(p.out, p.q_dtype, index * p.head_dim + d, x[i] * norm.factor);
      }
      if (base == 0 && lane == 0 && p.lse != nullptr) p.lse[index] = norm.lse;
    }
  }
}

// Called when a block has written its partial states of a split unit.
__device__ inline void EndItem(const AttentionParams& p, const WorkUnit& unit) {
  if (Arrive(&p.state.finished[unit.split_index], p.plan.split_units[unit.split_index].items)) MergeSplitUnit(p, unit);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_MERGE_CUH_
