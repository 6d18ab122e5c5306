// Tiles of keys and values in shared memory, of 16-bit elements, and how they are brought there.
#ifndef KVPAGE_KERNELS_CUDA_TILES_CUH_
#define KVPAGE_KERNELS_CUDA_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tokens.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Rows of kDim elements in units of 16 bytes, whose order within a row depends on the row: eight rows at one column
// (what ldmatrix reads) and eight columns of one row lie in different banks.
template <int kDim>
struct TileRows {
  static constexpr int kBytes = kDim * 2;
  static constexpr int kUnits = kDim / 8;

  __device__ static __forceinline__ int Offset(int row, int unit) {
    if constexpr (kUnits >= 8) return row * kBytes + ((unit ^ (row & 7)) << 4);
    return row * kBytes + ((unit ^ (row >> 1 & 3)) << 4);  // 32 elements: two rows in 128 bytes
  }
};

// Begins to copy kTokens keys and values from token `begin` on; zeros outside [from, to).
template <int kDim, int kTokens>
__device__ __forceinline__ void FetchTile(const TokenMap& map, const Tokens& tokens, std::int32_t begin,
                                          std::int32_t from, std::int32_t to, unsigned char* keys,
                                          unsigned char* values) {
  using Rows = TileRows<kDim>;
  constexpr int kStep = kThreads / Rows::kUnits;  // rows that the block copies at a time
  const int unit = threadIdx.x % Rows::kUnits, first = threadIdx.x / Rows::kUnits;
  if (map.chunk.divisor % kTokens == 0 || map.chunk.divisor == 0x7fffffff) {
    // All of it in one chunk: one address, and a stride. What is not copied is given an address that exists all the
    // same.
    const std::int32_t known = max(begin, from);
    const char* const safe = map.Key(tokens, known) + unit * 16;
    const char* key = safe + (begin - known + first) * map.token_stride;
#pragma unroll
    for (int i = 0; i < kTokens / kStep; ++i) {
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

// Begins to copy the queries of kRows rows of a tile, zeros for those that it does not have.
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
