// The decode kernel (decode.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/fill.cuh"
#include "kernels/cuda/pipeline_launch.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) DecodeKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  const CountedBlock counted(p.checked, p.last);
  WaitForPriorKernel();
  LetNextKernelStart();
  if (p.checked->ok != 0) DecodeAttention<T, kDim>(p, shared).Run();
  FillRest(p);
}

template <class T>
Status LaunchDecode(const AttentionParams& params, Stream stream) {
  return ForHeadDim(params.head_dim, [&](auto head_dim) {
    constexpr int kDim = decltype(head_dim)::value;
    return LaunchPipelined<DecodeShape<kDim>, DecodeKernel<T, kDim>>("decode_attention", params, stream);
  });
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_
