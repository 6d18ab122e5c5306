// The decode kernel for quantized storage (decode_quantized.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_LAUNCH_CUH_

#include "kernels/cuda/decode_quantized.cuh"
#include "kernels/cuda/fill.cuh"
#include "kernels/cuda/pipeline_launch.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

template <class S, class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    DecodeQuantizedKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  const CountedBlock counted(p.checked, p.last);
  WaitForPriorKernel();
  if (p.checked->ok != 0) DecodeQuantized<S, T, kDim>(p, shared).Run();
  FillRest(p);
}

template <class S, class T>
Status LaunchDecodeQuantized(const AttentionParams& params, Stream stream) {
  return ForHeadDim(params.head_dim, [&](auto head_dim) {
    constexpr int kDim = decltype(head_dim)::value;
    return LaunchPipelined<DecodeQuantizedShape<kDim>, DecodeQuantizedKernel<S, T, kDim>>("decode_quantized_attention",
                                                                                          params, stream);
  });
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_LAUNCH_CUH_
