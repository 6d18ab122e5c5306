// Shared prefixes of bfloat16, and the number of rows processed at a time.
#include <algorithm>

#include "kernels/cuda/grouped_launch.cuh"

namespace kvpage::cuda {

Status LaunchGroupedBf16(AttentionParams params, Stream stream) { return LaunchGrouped<Bf16>(params, stream); }

Status GetGroupRows(std::int32_t head_dim, std::int32_t* rows) {
  SharedLimits limits;
  KVPAGE_RETURN_IF_ERROR(GetSharedLimits(&limits));
  return ForHeadDim(head_dim, [&](auto dim) -> Status {
    constexpr int kDim = decltype(dim)::value;
    *rows = kTileRows * std::min<std::int32_t>(NumStages<DecodeShape<kDim>>(limits), kMostRowTiles<kDim>);
    return {};
  });
}

}  // namespace kvpage::cuda
