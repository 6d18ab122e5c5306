// The general kernel (general.cuh) and its launch.
#include <algorithm>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/fill.cuh"
#include "kernels/cuda/general.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) GeneralKernel(const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(shared);
  const CountedBlock counted(p.checked, p.last);
  WaitForPriorKernel();
  if (p.checked->ok != 0) GeneralAttention<T>(p, shared).Run();
  FillRest(p);
}

namespace {

constexpr int kMostStages = 4;

// Chooses the largest tile that leaves room for a second block on the multiprocessor, or else the largest that fits.
bool Choose(std::int64_t item, const SharedLimits& limits, AttentionParams* params, std::int64_t* size) {
  const std::int64_t padded = (params->head_dim * item + 15) / 16 * 16;
  // Rounded to an odd number of 16-byte units, so that lanes that each read one row hit different banks.
  params->row_stride = static_cast<std::int32_t>(padded / 16 % 2 == 0 ? padded + 16 : padded);
  for (const std::int64_t limit : {limits.beside, limits.alone}) {
    for (int tokens = kGeneralTokens; tokens >= (limit == limits.alone ? 1 : kGeneralTokens / 2); tokens /= 2) {
      for (int stages = kMostStages; stages >= 2; --stages) {
        *size = PlaceGeneral(params->head_dim, padded / item, stages, tokens, params->row_stride).size;
        if (*size > limit) continue;
        params->tile_tokens = tokens;
        params->stages = stages;
        return true;
      }
    }
  }
  return false;
}

}  // namespace

Status LaunchGeneral(DType storage, AttentionParams params, Stream stream) {
  SharedLimits limits;
  KVPAGE_RETURN_IF_ERROR(GetSharedLimits(&limits));
  std::int64_t size = 0;
  if (!Choose(static_cast<std::int64_t>(ItemSize(storage)), limits, &params, &size)) {
    return InvalidArgument("attention on CUDA: head_dim " + std::to_string(params.head_dim) + " needs " +
                           std::to_string(size) + " bytes of shared memory, a block can have " +
                           std::to_string(limits.alone) + ": use a smaller head_dim, or implementation=\"xla\"");
  }
  return ForStorage(storage, [&](auto element) {
    using T = decltype(element);
    const LaunchShape shape = {static_cast<unsigned>(params.blocks), kThreads, static_cast<std::size_t>(size), true};
    return Launch<GeneralKernel<T>, SharedUse::kAll>("general_attention", shape, stream, params);
  });
}

}  // namespace kvpage::cuda
