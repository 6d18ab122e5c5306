// The prefill kernel (prefill.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_

#include "kernels/cuda/pipeline_launch.cuh"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) PrefillKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  WaitForPriorKernel();
  if (p.checked->ok == 0 || p.plan.counts->items == 0) {
    if (threadIdx.x == 0) CountBlockOut(p.checked, p.last);
    return;
  }
  PrefillAttention<T, kDim>(p, shared).Run();
}

template <class T>
Status LaunchPrefill(const AttentionParams& params, Stream stream) {
  return ForHeadDim(params.head_dim, [&](auto head_dim) {
    constexpr int kDim = decltype(head_dim)::value;
    return LaunchPipelined<PrefillShape<kDim>, PrefillKernel<T, kDim>>("prefill_attention", params, stream);
  });
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_
