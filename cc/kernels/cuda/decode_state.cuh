// The softmax state of a tile of rows in the decode kernels: weighted values, max and sum, in registers.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_STATE_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_STATE_CUH_

#include <cstdint>

#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/merge_prefix.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// kInterleaved: tiles 2 n and 2 n + 1 hold the even and the odd columns of 16, so that a thread holds four adjacent
// columns.
template <int kDim, bool kInterleaved>
struct DecodeState {
  static constexpr int kTiles = kDim / 8 / kWarps;  // tiles of 8 columns per warp

  // Laid out as fragment C (ptx.cuh); max and sum of the rows in its lower and upper half.
  float values[kTiles][4];
  float max[2], sum[2];

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = NegativeInfinity();
      sum[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
    }
  }

  // Merges the state of the next span into this one.
  __device__ __forceinline__ void Merge(const DecodeState& next, float score_unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const StateMerge merge(max[half], sum[half], next.max[half], next.sum[half], score_unit);
      max[half] = merge.max;
      sum[half] = merge.sum;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) values[n][i] = merge(values[n][i], next.values[n][i]);
      }
    }
  }

  // Row of the tile that a thread holds in the lower (0) or upper (1) half of a fragment.
  __device__ __forceinline__ static int Row(int lane, int half) { return lane / 4 + 8 * half; }
  // Pair n of adjacent columns that a thread holds: its first column, and its values in a row.
  __device__ __forceinline__ static int Column(int lane, int warp, int n) {
    if constexpr (kInterleaved) return (warp * kTiles + n / 2 * 2) * 8 + lane % 4 * 4 + n % 2 * 2;
    return (warp * kTiles + n) * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ float2 Pair(int n, int half) const {
    if constexpr (kInterleaved) {
      const int i = 2 * half + n % 2;
      return make_float2(values[n / 2 * 2][i], values[n / 2 * 2 + 1][i]);
    }
    return make_float2(values[n][2 * half], values[n][2 * half + 1]);
  }

  // Writes the rows' partial states to memory, at `index` (merge.cuh).
  __device__ __forceinline__ void Store(const AttentionParams& p, const WorkUnit& unit, std::int32_t index) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (Row(lane, half) >= unit.rows) continue;
      const std::int64_t state = StateIndex(p, unit, Row(lane, half), index);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        *reinterpret_cast<float2*>(p.state.partial_values + state * kDim + Column(lane, warp, n)) = Pair(n, half);
      }
      if (warp == 0 && lane % 4 == 0) p.state.partial_sums[state] = make_float2(max[half], sum[half]);
    }
  }

  // Writes the state of a span that is computed for a group, for the row in one half. `row` is an index into
  // CallState::prefix_values.
  __device__ __forceinline__ void StorePrefix(const AttentionParams& p, int half, std::int32_t row,
                                              std::int32_t span) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const std::int64_t state = PrefixIndex(p, row, span);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      *reinterpret_cast<float2*>(p.state.prefix_values + state * kDim + Column(lane, warp, n)) = Pair(n, half);
    }
    if (warp == 0 && lane % 4 == 0) p.state.prefix_sums[state] = make_float2(max[half], sum[half]);
  }
  // Reads the states that MergePrefixes left for `rows` rows, starting at `row`.
  __device__ __forceinline__ void LoadPrefix(const AttentionParams& p, std::int32_t row, std::int32_t rows) {
    static_assert(!kInterleaved);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Less than kMaxPrefixRows * kMaxSpans * 256: 32 bits are enough.
      const std::int32_t state = (row + min(Row(lane, half), rows - 1)) * p.partials_per_row;
      const float2 sums = p.state.prefix_sums[state];
      max[half] = sums.x;
      sum[half] = sums.y;
      const float* const from = p.state.prefix_values + (state * kDim + Column(lane, warp, 0));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(from + 8 * n);
        values[n][2 * half] = pair.x;
        values[n][2 * half + 1] = pair.y;
      }
    }
  }

  // Normalizes the rows and writes out and lse.
  template <class T>
  __device__ __forceinline__ void Write(const AttentionParams& p, const WorkUnit& unit) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (Row(lane, half) >= unit.rows) continue;
      const Normalization norm(p, RowHead(p, unit, Row(lane, half)), max[half], sum[half]);
      const std::int64_t index = RowIndex(p, unit, Row(lane, half));
      T* out = static_cast<T*>(p.out) + index * kDim;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float2 pair = Pair(n, half);
        *reinterpret_cast<std::uint32_t*>(out + Column(lane, warp, n)) =
            Pack<T>(pair.x * norm.factor, pair.y * norm.factor);
      }
      if (warp == 0 && lane % 4 == 0 && p.lse != nullptr) p.lse[index] = norm.lse;
    }
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_STATE_CUH_
