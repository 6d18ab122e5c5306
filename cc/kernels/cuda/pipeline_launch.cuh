// Launches of the tensor core kernels: dispatch on the head size, with as many pipeline stages as fit.
#ifndef KVPAGE_KERNELS_CUDA_PIPELINE_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_PIPELINE_LAUNCH_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// The most stages, from 2 to Shape::kMaxStages, that leave room for a second block on the multiprocessor.
template <class Shape>
std::int32_t NumStages(const SharedLimits& limits) {
  const std::int64_t stages = (limits.beside - Shape::kFixedBytes) / Shape::kStageBytes;
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(stages, 2, Shape::kMaxStages));
}

// Launches the kernel with that many stages.
template <class Shape, auto kKernel>
Status LaunchPipelined(const char* name, AttentionParams params, Stream stream) {
  SharedLimits limits;
  KVPAGE_RETURN_IF_ERROR(GetSharedLimits(&limits));
  params.stages = NumStages<Shape>(limits);
  const std::size_t bytes = Shape::kFixedBytes + static_cast<std::size_t>(params.stages) * Shape::kStageBytes;
  const LaunchShape shape = {static_cast<unsigned>(params.blocks), kThreads, bytes, /*overlap=*/true};
  return Launch<kKernel, SharedUse::kAll>(name, shape, stream, params);
}

// Calls fn(std::integral_constant<int, head_dim>) for the head sizes of HasTensorCoreKernels.
template <class Fn>
Status ForHeadDim(std::int32_t head_dim, Fn&& fn) {
  if (head_dim == 64) return fn(std::integral_constant<int, 64>{});
  if (head_dim == 128) return fn(std::integral_constant<int, 128>{});
  return fn(std::integral_constant<int, 256>{});
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PIPELINE_LAUNCH_CUH_
