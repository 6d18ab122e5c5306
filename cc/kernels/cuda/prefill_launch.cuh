// The prefill kernel (prefill.cuh) and its launch.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_

#include <cstdint>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/prefill.cuh"

namespace kvpage::cuda {

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) PrefillKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  WaitForPriorKernel();
  if (p.plan.counts->items == 0) return;
  PrefillAttention<T, kDim>(p, shared).Run();
}

template <class T, int kDim>
Status LaunchPrefillOf(AttentionParams params, Stream stream) {
  using Shape = PrefillShape<kDim>;
  SharedLimits limits;
  KVPAGE_RETURN_IF_ERROR(GetSharedLimits(&limits));
  const std::int64_t room = (limits.beside - Shape::kFixedBytes) / (2 * Shape::kTileBytes);
  params.stages = static_cast<std::int32_t>(room < 2 ? 2 : (room > 4 ? 4 : room));
  const std::size_t bytes = Shape::kFixedBytes + static_cast<std::size_t>(params.stages) * 2 * Shape::kTileBytes;
  const LaunchShape shape = {static_cast<unsigned>(params.blocks), kThreads, bytes, true};
  return Launch("prefill_attention", PrefillKernel<T, kDim>, shape, stream, params);
}

template <class T>
Status LaunchPrefill(const AttentionParams& params, Stream stream) {
  if (params.head_dim == 64) return LaunchPrefillOf<T, 64>(params, stream);
  if (params.head_dim == 128) return LaunchPrefillOf<T, 128>(params, stream);
  return LaunchPrefillOf<T, 256>(params, stream);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_LAUNCH_CUH_
