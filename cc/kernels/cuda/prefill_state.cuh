// The softmax state of a tile of rows in the prefill kernel: weighted values, max and sum, in registers and in memory.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_

#include <cstdint>

#include "kernels/cuda/prefill_queue.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"

namespace kvpage::cuda {

template <int kDim>
struct PrefillState {
  static constexpr int kBlocks = PrefillRows(kDim) / 16 / kWarps;  // blocks of 16 rows per warp
  static constexpr int kColumns = kDim / 8;                        // column tiles of width 8

  // Laid out as fragment C (ptx.cuh). `sum` is this thread's part until the span ends.
  float values[kBlocks][kColumns][4];
  float max[kBlocks][2], sum[kBlocks][2];

  // Row of the tile that a thread holds in the lower (0) or upper (1) half of fragment `block`.
  __device__ __forceinline__ static int Row(int lane, int warp, int block, int half) {
    return (warp * kBlocks + block) * 16 + lane / 4 + 8 * half;
  }

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max[m][half] = NegativeInfinity();
        sum[m][half] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] = 0.0f;
      }
    }
  }

  // Reduces each thread's part of the sums to the rows' sums.
  __device__ __forceinline__ void SumRows() {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kFullMask, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kFullMask, sum[m][half], 2);
      }
    }
  }

  // ---- states in memory: every thread reads only its own part ----
  __device__ __forceinline__ static std::int64_t At(int index) { return std::int64_t{index} * kThreads + threadIdx.x; }
  __device__ __forceinline__ static constexpr int ValueAt(int m, int n, int i) { return (m * kColumns + n) * 4 + i; }
  __device__ __forceinline__ static constexpr int SumAt(int m, int half, int which) {
    return kBlocks * kColumns * 4 + (m * 2 + half) * 2 + which;
  }

  __device__ __forceinline__ void Store(float* to) const {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[At(SumAt(m, half, 0))] = max[m][half];
        to[At(SumAt(m, half, 1))] = sum[m][half];
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[At(ValueAt(m, n, i))] = values[m][n][i];
      }
    }
  }

  // Merges this state with one in memory, which covers tokens before (kMemoryFirst) or after those of this state.
  template <bool kMemoryFirst>
  __device__ __forceinline__ void Merge(const float* memory, float score_unit) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float other_max = __ldcg(memory + At(SumAt(m, half, 0))),
                    other_sum = __ldcg(memory + At(SumAt(m, half, 1)));
        const StateMerge merge = kMemoryFirst
                                     ? StateMerge(other_max, other_sum, max[m][half], sum[m][half], score_unit)
                                     : StateMerge(max[m][half], sum[m][half], other_max, other_sum, score_unit);
        max[m][half] = merge.max;
        sum[m][half] = merge.sum;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const float other = __ldcg(memory + At(ValueAt(m, n, i)));
            values[m][n][i] = kMemoryFirst ? merge(other, values[m][n][i]) : merge(values[m][n][i], other);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void Load(const float* from) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max[m][half] = __ldcg(from + At(SumAt(m, half, 0)));
        sum[m][half] = __ldcg(from + At(SumAt(m, half, 1)));
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] = __ldcg(from + At(ValueAt(m, n, i)));
      }
    }
  }

  // Normalizes the rows and writes out and lse.
  template <class T>
  __device__ __forceinline__ void Write(const AttentionParams& p, const PrefillItem& work) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Row(lane, warp, m, half);
        if (row >= work.rows) continue;
        const std::int64_t index = RowIndex(p, work.sequence, work.head, work.first_row + row);
        const std::int32_t q_head = RowHead(p, work.head, work.first_row + row);
        const Normalization norm(p, q_head, max[m][half], sum[m][half]);
        T* out = static_cast<T*>(p.out) + index * kDim + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          *reinterpret_cast<std::uint32_t*>(out + n * 8) =
              Pack<T>(values[m][n][2 * half] * norm.factor, values[m][n][2 * half + 1] * norm.factor);
        }
        if (lane % 4 == 0 && p.lse != nullptr) p.lse[index] = norm.lse;
      }
    }
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_
