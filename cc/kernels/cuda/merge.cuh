// States in memory: how a unit that several blocks share becomes one answer.
#ifndef KVPAGE_KERNELS_CUDA_MERGE_CUH_
#define KVPAGE_KERNELS_CUDA_MERGE_CUH_

#include <cstdint>

#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Where the state of a row and span lies; slot 0 holds those of the first piece, folded.
__device__ __forceinline__ std::int64_t StateIndex(const AttentionParams& p, const Unit& unit, std::int32_t row,
                                                   std::int32_t slot) {
  return std::int64_t{p.plan.shared[unit.shared_index].first_row + row} * p.span_slots + slot;
}

// Whether this block holds the unit's first piece.
__device__ __forceinline__ bool IsFirstPiece(const Unit& unit) { return unit.from <= unit.begin; }

// Says that this block's states of the unit are written; true for the block that comes last. All threads call it.
__device__ __forceinline__ bool Arrive(std::int32_t* finished, std::int32_t pieces) {
  KVPAGE_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1) == pieces - 1;
  __syncthreads();
  const bool mine = last;
  __threadfence();
  __syncthreads();
  return mine;
}

// Folds the states of a shared unit in the order of their spans and writes the answer.
__device__ inline void MergeShared(const AttentionParams& p, const Unit& unit) {
  const std::int32_t first = (p.plan.shared[unit.shared_index].token >> unit.shift) - unit.first_span;
  const std::int32_t end = ((unit.end - 1) >> unit.shift) - unit.first_span + 1;
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kColumns = 4;
  for (std::int32_t row = threadIdx.x / kWarpSize; row < unit.rows; row += kWarps) {
    const std::int64_t state = StateIndex(p, unit, row, 0);
    const std::int64_t index = RowIndex(p, unit, row);
    const float* values = p.plan.values + state * p.head_dim;
    const float2* sums = p.plan.sums + state;
    for (std::int32_t base = 0; base < p.head_dim; base += kColumns * kWarpSize) {
      float2 sum = __ldcg(sums);
      float x[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const std::int32_t d = base + i * kWarpSize + lane;
        x[i] = d < p.head_dim ? __ldcg(values + d) : 0.0f;
      }
#pragma unroll 4
      for (std::int32_t slot = first; slot < end; ++slot) {
        const float2 other = __ldcg(sums + slot);
        const Fold fold(sum.x, sum.y, other.x, other.y);
        sum.x = fold.max;
        sum.y = fold.sum;
        const float* from = values + std::int64_t{slot} * p.head_dim;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const std::int32_t d = base + i * kWarpSize + lane;
          x[i] = fold(x[i], d < p.head_dim ? __ldcg(from + d) : 0.0f);
        }
      }
      const Finish finish(p, RowHead(p, unit, row), sum.x, sum.y);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const std::int32_t d = base + i * kWarpSize + lane;
        if (d < p.head_dim) StoreElement(p.out, p.q_dtype, index * p.head_dim + d, x[i] * finish.factor);
      }
      if (base == 0 && lane == 0 && p.lse != nullptr) p.lse[index] = finish.lse;
    }
  }
}

// Ends a block's piece of a shared unit, whose states it has written.
__device__ inline void EndPiece(const AttentionParams& p, const Unit& unit) {
  Shared& shared = p.plan.shared[unit.shared_index];
  if (Arrive(&shared.finished, shared.pieces)) MergeShared(p, unit);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_MERGE_CUH_
