// The decode kernel (decode.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_

#include <cstdint>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/fill.cuh"

namespace kvpage::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) DecodeKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  WaitForPriorKernel();
  LetNextKernelStart();
  if (p.checked->ok != 0) DecodeAttention<T, kDim>(p, shared).Run();
  FillRest(p);
}

// For each head size, as many stages as leave room for a second block on the multiprocessor.
template <class T, int kDim>
Status LaunchDecodeOf(AttentionParams params, Stream stream) {
  using Shape = DecodeShape<kDim>;
  SharedLimits limits;
  KVPAGE_RETURN_IF_ERROR(GetSharedLimits(&limits));
  const std::int64_t room = (limits.beside - Shape::kFixedBytes) / Shape::kStageBytes;
  params.stages = static_cast<std::int32_t>(room < 2 ? 2 : (room > kMaxStages ? kMaxStages : room));
  const std::size_t bytes = Shape::kFixedBytes + static_cast<std::size_t>(params.stages) * Shape::kStageBytes;
  const LaunchShape shape = {static_cast<unsigned>(params.blocks), kThreads, bytes, true};
  return Launch("decode_attention", DecodeKernel<T, kDim>, shape, stream, params);
}

template <class T>
Status LaunchDecode(const AttentionParams& params, Stream stream) {
  if (params.head_dim == 64) return LaunchDecodeOf<T, 64>(params, stream);
  if (params.head_dim == 128) return LaunchDecodeOf<T, 128>(params, stream);
  return LaunchDecodeOf<T, 256>(params, stream);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_LAUNCH_CUH_
