// States of spans that were computed for groups of sequences (grouped.cuh), and their merge before decode continues.
#ifndef KVPAGE_KERNELS_CUDA_MERGE_PREFIX_CUH_
#define KVPAGE_KERNELS_CUDA_MERGE_PREFIX_CUH_

#include <cstdint>

#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Index of the state of a row and span.
__device__ __forceinline__ std::int64_t PrefixIndex(const AttentionParams& p, std::int32_t row, std::int32_t span) {
  return std::int64_t{row} * p.partials_per_row + span;
}

// Whether a block's item begins with spans that a group has computed.
__device__ __forceinline__ bool HasPrefix(const WorkUnit& unit) { return unit.prefix > 0 && IsFirstItem(unit); }

// Index of the unit's first row in CallState::prefix_values.
__device__ __forceinline__ std::int32_t PrefixRow(const AttentionParams& p, const WorkIterator<true>& at) {
  return p.plan.prefix_rows[at.sequence] + at.unit.head * at.unit.rows;
}

// Merges the spans of one row in order, with all lanes of a warp. The result replaces the state of the first span.
template <int kDim>
__device__ __forceinline__ void MergePrefixRow(const AttentionParams& p, std::int32_t row, std::int32_t spans) {
  constexpr int kColumns = kDim / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const float unit = ScoreUnit(p);
  float* const values = p.state.prefix_values + PrefixIndex(p, row, 0) * kDim + lane;
  float2* const sums = p.state.prefix_sums + PrefixIndex(p, row, 0);
  float2 sum = make_float2(NegativeInfinity(), 0.0f);
  float x[kColumns] = {};
  // Unrolled to load several spans at once, because each load is a round trip to the L2 cache.
#pragma unroll 4
  for (std::int32_t span = 0; span < spans; ++span) {
    const float2 next = __ldcg(sums + span);
    const StateMerge merge(sum.x, sum.y, next.x, next.y, unit);
    sum = make_float2(merge.max, merge.sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] = merge(x[i], __ldcg(values + std::int64_t{span} * kDim + i * kWarpSize));
  }
  __syncwarp(kFullMask);  // all lanes have read the sums
#pragma unroll
  for (int i = 0; i < kColumns; ++i) values[i * kWarpSize] = x[i];
  if (lane == 0) *sums = sum;
}

// Merges what groups have computed for the items of this block's piece. Kept out of the loop over tiles, which must
// stay small. All threads of the block must call it.
template <int kDim>
__device__ __forceinline__ void MergePrefixes(const AttentionParams& p, WorkIterator<true> at, const SplitPoint& from,
                                              const SplitPoint& to, int tokens) {
  while (!at.done) {
    if (HasPrefix(at.unit)) {
      const std::int32_t first = PrefixRow(p, at);
      for (std::int32_t row = threadIdx.x / kWarpSize; row < at.unit.rows; row += kWarps) {
        MergePrefixRow<kDim>(p, first + row, at.unit.prefix);
      }
    }
    at.token = at.ItemEnd();
    at.Next(p, from, to, tokens);
  }
  __syncthreads();
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_MERGE_PREFIX_CUH_
