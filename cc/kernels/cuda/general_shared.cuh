// Layout of the general kernel's shared memory (general.cuh).
#ifndef KVPAGE_KERNELS_CUDA_GENERAL_SHARED_CUH_
#define KVPAGE_KERNELS_CUDA_GENERAL_SHARED_CUH_

#include <cstdint>

#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

inline constexpr int kGeneralTokens = kWarpSize;  // tokens per tile, at most

// Byte offsets in a block's dynamic shared memory.
struct GeneralShared {
  std::int64_t queries;  // [kTileRows, columns] floats; columns = head_dim rounded up to 16 bytes of storage
  std::int64_t span;  // [kTileRows, head_dim] floats: weighted values of the current span, and of the spans before it
  std::int64_t unit;
  std::int64_t weights;  // [kTileRows, kGeneralTokens] floats
  std::int64_t dots;     // [kWarps, kTileRows, tile_tokens] floats: each warp's part of the dot products
  std::int64_t factors;  // [2, kTileRows] floats
  std::int64_t scales;   // [stages, 2, kGeneralTokens] floats
  std::int64_t tiles;    // [stages, 2, tile_tokens, row_stride]
  std::int64_t size;
};

__host__ __device__ inline GeneralShared PlaceGeneral(std::int64_t head_dim, std::int64_t columns, int stages,
                                                      int tile_tokens, int row_stride) {
  GeneralShared at = {};
  std::int64_t end = 0;
  const auto place = [&end](std::int64_t bytes) {
    const std::int64_t here = end;
    end += (bytes + 15) / 16 * 16;
    return here;
  };
  at.queries = place(kTileRows * columns * 4);
  at.span = place(kTileRows * head_dim * 4);
  at.unit = place(kTileRows * head_dim * 4);
  at.weights = place(kGeneralTokens * kTileRows * 4);
  at.dots = place(std::int64_t{kWarps} * kTileRows * tile_tokens * 4);
  at.factors = place(2 * kTileRows * 4);
  at.scales = place(std::int64_t{stages} * 2 * kGeneralTokens * 4);
  at.tiles = place(std::int64_t{stages} * 2 * tile_tokens * row_stride);
  at.size = end;
  return at;
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_GENERAL_SHARED_CUH_
