// The kernel for shared prefixes (grouped.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_GROUPED_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_GROUPED_LAUNCH_CUH_

#include "kernels/cuda/grouped.cuh"
#include "kernels/cuda/pipeline_launch.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

// Never the last kernel of an op, because decode follows. Decode starts while this kernel is still waiting, so if
// nothing is grouped, only the end of this kernel separates the check from decode.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) GroupedKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  LetNextKernelStart();
  WaitForPriorKernel();
  if (p.checked->ok != 0 && p.checked->groups_hold != 0) GroupedAttention<T, kDim>(p, shared).Run();
}

template <class T>
Status LaunchGrouped(const AttentionParams& params, Stream stream) {
  return ForHeadDim(params.head_dim, [&](auto head_dim) {
    constexpr int kDim = decltype(head_dim)::value;
    return LaunchPipelined<DecodeShape<kDim>, GroupedKernel<T, kDim>>("grouped_attention", params, stream);
  });
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_GROUPED_LAUNCH_CUH_
