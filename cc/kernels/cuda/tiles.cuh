// Tiles of 16-bit keys, values and queries in shared memory, and their asynchronous copies.
#ifndef KVPAGE_KERNELS_CUDA_TILES_CUH_
#define KVPAGE_KERNELS_CUDA_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tokens.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Rows of kDim elements in units of 16 bytes, swizzled so that eight rows at one column (as ldmatrix reads them) and
// eight columns of one row are in different banks.
template <int kDim>
struct TileRows {
  static constexpr int kBytes = kDim * 2;
  static constexpr int kUnits = kDim / 8;

  __device__ static __forceinline__ int Offset(int row, int unit) {
    if constexpr (kUnits >= 8) return row * kBytes + ((unit ^ (row & 7)) << 4);
    return row * kBytes + ((unit ^ (row >> 1 & 3)) << 4);  // 32 elements: two rows in 128 bytes
  }
};

// FetchTile for keys and values in different chunks. Not unrolled, because kernels contain both versions.
template <int kDim, int kTokens>
__device__ __forceinline__ void FetchTileApart(const TokenMap& map, const Tokens& tokens, std::int32_t begin,
                                               std::int32_t from, std::int32_t to, unsigned char* keys,
                                               unsigned char* values) {
  using Rows = TileRows<kDim>;
  const int unit = threadIdx.x % Rows::kUnits;
  std::int32_t known = -1;
  const char* base = nullptr;  // keys of the chunk
  std::int64_t apart = 0;
#pragma unroll 1
  for (int row = threadIdx.x / Rows::kUnits; row < kTokens; row += kThreads / Rows::kUnits) {
    const bool valid = begin + row >= from && begin + row < to;
    const std::int32_t token = valid ? begin + row : from, index = map.chunk.Divide(token);
    if (index != known) {
      base = tokens.first + tokens.table[index] * map.chunk_stride + unit * 16;
      apart = map.Apart(tokens, index);
      known = index;
    }
    const char* const key = base + (token - index * map.chunk.divisor) * map.token_stride;
    CopyAsync16(keys + Rows::Offset(row, unit), key, valid);
    CopyAsync16(values + Rows::Offset(row, unit), key + apart, valid);
  }
}

// Starts copying kTokens keys and values, from token `begin` on, with zeros outside of [from, to).
template <int kDim, int kTokens>
__device__ __forceinline__ void FetchTile(const TokenMap& map, const Tokens& tokens, std::int32_t begin,
                                          std::int32_t from, std::int32_t to, unsigned char* keys,
                                          unsigned char* values) {
  if (map.apart()) return FetchTileApart<kDim, kTokens>(map, tokens, begin, from, to, keys, values);
  using Rows = TileRows<kDim>;
  constexpr int kStep = kThreads / Rows::kUnits;  // rows that the block copies at a time
  const int unit = threadIdx.x % Rows::kUnits, first = threadIdx.x / Rows::kUnits;
  const std::int32_t chunk = map.chunk.divisor;
  const bool in_one = chunk % kTokens == 0 || chunk == 0x7fffffff;
  if (in_one || (kTokens % chunk == 0 && chunk % kStep == 0)) {
    // One address and a stride for each run of tokens within a chunk; a tile begins at a multiple of both. Tokens that
    // are not copied use the address of another token, because it must be valid.
    const std::int32_t run = in_one ? kTokens : chunk;
    const char* safe = nullptr;
    const char* key = nullptr;
#pragma unroll
    for (int i = 0; i < kTokens / kStep; ++i) {
      if ((i * kStep & (run - 1)) == 0) {
        const std::int32_t known = min(max(begin + i * kStep, from), to - 1);
        safe = map.Key(tokens, known) + unit * 16;
        key = safe + (begin + i * kStep - known + first) * map.token_stride;
      }
      const int row = first + i * kStep;
      const bool valid = begin + row >= from && begin + row < to;
      const char* const source = valid ? key : safe;
      CopyAsync16(keys + Rows::Offset(row, unit), source, valid);
      CopyAsync16(values + Rows::Offset(row, unit), source + map.kv_stride, valid);
      key += kStep * map.token_stride;
    }
    return;
  }
#pragma unroll 4
  for (int i = 0; i < kTokens / kStep; ++i) {
    const int row = first + i * kStep;
    const bool valid = begin + row >= from && begin + row < to;
    const char* key = map.Key(tokens, valid ? begin + row : from) + unit * 16;
    CopyAsync16(keys + Rows::Offset(row, unit), key, valid);
    CopyAsync16(values + Rows::Offset(row, unit), key + map.kv_stride, valid);
  }
}

// Starts copying the queries of a tile of kRows rows, with zeros from row `rows` on.
template <int kDim, int kRows>
__device__ __forceinline__ void FetchQueries(const AttentionParams& p, const Sequence& sequence, std::int32_t head,
                                             std::int32_t first_row, std::int32_t rows, unsigned char* to) {
  using Rows = TileRows<kDim>;
  constexpr int kStep = kThreads / Rows::kUnits;
  const int unit = threadIdx.x % Rows::kUnits;
  for (int row = threadIdx.x / Rows::kUnits; row < kRows; row += kStep) {
    const bool valid = row < rows;
    const std::int64_t index = RowIndex(p, sequence, head, valid ? first_row + row : first_row);
    CopyAsync16(to + Rows::Offset(row, unit), static_cast<const char*>(p.q) + index * Rows::kBytes + unit * 16, valid);
  }
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_TILES_CUH_
