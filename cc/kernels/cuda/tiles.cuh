// Tiles of keys and values in shared memory, of 16-bit elements, and how they are brought there.
#ifndef KVPAGE_KERNELS_CUDA_TILES_CUH_
#define KVPAGE_KERNELS_CUDA_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
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
    const std::int32_t at = valid ? first_row + row : first_row, token = at / p.group;
    const std::int64_t index =
        (std::int64_t{sequence.query_begin} + token) * p.num_q_heads + head * p.group + (at - token * p.group);
    CopyAsync16(to + Rows::Offset(row, unit), static_cast<const char*>(p.q) + index * Rows::kBytes + unit * 16, valid);
  }
}

// ---- infinities and NaN in values ----
// A weight of 0 times such a value is NaN, so where rows of a tile see different tokens these values are taken out of
// the product, and the rows that do see them get their infinity or NaN in a product of its own.

template <class T>
inline constexpr std::uint32_t kInfinityBits = 0;
template <>
inline constexpr std::uint32_t kInfinityBits<Bf16> = 0x7f80;
template <>
inline constexpr std::uint32_t kInfinityBits<F16> = 0x7c00;
template <class T>
inline constexpr std::uint32_t kOneBits = 0;
template <>
inline constexpr std::uint32_t kOneBits<Bf16> = 0x3f80;
template <>
inline constexpr std::uint32_t kOneBits<F16> = 0x3c00;

// The sign bits of those of two elements that are infinite or NaN.
template <class T>
__device__ __forceinline__ std::uint32_t NonFinite(std::uint32_t pair) {
  constexpr std::uint32_t kStep = 0x8000 - kInfinityBits<T>;
  return ((pair & 0x7fff7fffu) + (kStep << 16 | kStep)) & 0x80008000u;
}

// Two elements with 0 for what is not finite.
template <class T>
__device__ __forceinline__ std::uint32_t KeepFinite(std::uint32_t pair) {
  return pair & ~((NonFinite<T>(pair) >> 15) * 0xffffu);
}

// 1 where the element is NaN or the infinity of that sign, else 0.
template <class T, bool kNegative>
__device__ __forceinline__ std::uint32_t Marks(std::uint32_t pair) {
  std::uint32_t marks = 0;
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    const std::uint32_t bits = pair >> shift & 0xffff, size = bits & 0x7fff;
    if (size > kInfinityBits<T> || (size == kInfinityBits<T> && (bits >> 15 != 0) == kNegative)) {
      marks |= kOneBits<T> << shift;
    }
  }
  return marks;
}

// Whether a tile holds such values; all threads must call it.
template <class T, int kDim, int kTokens>
__device__ __forceinline__ bool AnyNonFinite(const unsigned char* tile) {
  std::uint32_t found = 0;
  for (int i = threadIdx.x; i < kTokens * kDim / 8; i += kThreads) {
    const uint4 units = *reinterpret_cast<const uint4*>(tile + i * 16);
    found |= NonFinite<T>(units.x) | NonFinite<T>(units.y) | NonFinite<T>(units.z) | NonFinite<T>(units.w);
  }
  return __syncthreads_or(found != 0) != 0;
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_TILES_CUH_
