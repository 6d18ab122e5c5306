// What a block of prefill holds of its tile of rows: weighted values, max and sum, in registers and in memory.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_

#include <cstdint>

#include "kernels/cuda/prefill_items.cuh"
#include "kernels/cuda/softmax.cuh"

namespace kvpage::cuda {

template <int kDim>
struct PrefillState {
  static constexpr int kBlocks = PrefillRows(kDim) / 16 / kWarps;  // of 16 rows, a warp's
  static constexpr int kColumns = kDim / 8;                        // of 8

  // As the fragments of products hold them (ptx.cuh). `sum` is this thread's part until the span ends.
  float values[kBlocks][kColumns][4];
  float max[kBlocks][2], sum[kBlocks][2];

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

  // Makes each thread's part of the sums the rows' sums.
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

  // ---- states in memory, each thread's where only it looks ----
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

  // This state becomes that in memory folded with it.
  __device__ __forceinline__ void FoldKept(const float* before) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Fold fold(__ldcg(before + At(SumAt(m, half, 0))), __ldcg(before + At(SumAt(m, half, 1))), max[m][half],
                        sum[m][half]);
        max[m][half] = fold.max;
        sum[m][half] = fold.sum;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            values[m][n][i] = fold(__ldcg(before + At(ValueAt(m, n, i))), values[m][n][i]);
          }
        }
      }
    }
  }

  // This state becomes it folded with that in memory.
  __device__ __forceinline__ void FoldNext(const float* next) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Fold fold(max[m][half], sum[m][half], __ldcg(next + At(SumAt(m, half, 0))),
                        __ldcg(next + At(SumAt(m, half, 1))));
        max[m][half] = fold.max;
        sum[m][half] = fold.sum;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            values[m][n][i] = fold(values[m][n][i], __ldcg(next + At(ValueAt(m, n, i))));
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
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_STATE_CUH_
