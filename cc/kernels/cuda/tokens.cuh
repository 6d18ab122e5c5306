// Addresses of tokens in a view, without divisions in the inner loop.
#ifndef KVPAGE_KERNELS_CUDA_TOKENS_CUH_
#define KVPAGE_KERNELS_CUDA_TOKENS_CUH_

#include <cstdint>

#include "base/kv_view.h"
#include "kernels/cuda/device.cuh"

namespace kvpage::cuda {

// Whether the address of every key and value is a multiple of 16 bytes.
__host__ __device__ inline bool IsAligned(const KVView& view) {
  const auto base = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.base));
  return ((base | view.slot_stride | view.chunk_stride | view.layer_stride | view.kv_stride | view.head_stride |
           view.token_stride) &
          15) == 0;
}

// n / d for 0 <= n < 2^31 by multiplication: m = ceil(2^(32 + l) / d) with 2^l >= d has 33 bits; 32 of them are stored,
// and n is added for the top one.
struct Divider {
  std::uint32_t multiplier = 0, shift = 0;
  std::int32_t divisor = 1;

  __device__ __forceinline__ explicit Divider(std::int32_t d) : divisor(d) {
    while (shift < 31 && (std::uint32_t{1} << shift) < static_cast<std::uint32_t>(d)) ++shift;
    const std::uint64_t excess = (std::uint64_t{1} << shift) - static_cast<std::uint64_t>(d);
    multiplier = static_cast<std::uint32_t>((excess << 32) / static_cast<std::uint64_t>(d) + 1);
  }
  __device__ __forceinline__ std::int32_t Divide(std::int32_t n) const {
    const std::uint64_t high = static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * multiplier >> 32;
    return static_cast<std::int32_t>((high + static_cast<std::uint32_t>(n)) >> shift);
  }
};

// The keys of one slot and KV head. A value is kv_stride bytes after its key, unless the table has separate entries for
// values (TokenMap::apart).
struct Tokens {
  const char* first;          // keys of chunk 0, or of physical chunk 0 if there is a table
  const std::int32_t* table;  // the slot's row, or null

  __device__ __forceinline__ Tokens(const KVView& view, std::int32_t slot, std::int32_t layer, std::int32_t head)
      : first(view.base + layer * view.layer_stride + head * view.head_stride), table(nullptr) {
    if (view.table != nullptr) {
      table = view.table + slot * view.table_width;
    } else {
      first += slot * view.slot_stride;
    }
  }
};

// The part of an address computation that does not depend on slot and head.
struct TokenMap {
  Divider chunk;
  std::int64_t chunk_stride, token_stride, kv_stride;
  std::int32_t table_kv_stride;

  // Chunks without gaps between them are treated as one. (Chunks that hold scales have gaps.)
  __device__ __forceinline__ explicit TokenMap(const KVView& view)
      : chunk(view.table == nullptr && view.chunk_stride == view.tokens_per_chunk * view.token_stride
                  ? 0x7fffffff
                  : static_cast<std::int32_t>(min(view.tokens_per_chunk, std::int64_t{0x7fffffff}))),
        chunk_stride(view.chunk_stride),
        token_stride(view.token_stride),
        kv_stride(view.kv_stride),
        table_kv_stride(static_cast<std::int32_t>(view.table_kv_stride)) {}

  // Keys and values are in different physical chunks: KVView::values_apart.
  __device__ __forceinline__ bool apart() const { return table_kv_stride != 0; }
  // Bytes from the keys of chunk `index` to its values, if apart().
  __device__ __forceinline__ std::int64_t Apart(const Tokens& tokens, std::int32_t index) const {
    return (tokens.table[index + table_kv_stride] - tokens.table[index]) * chunk_stride;
  }
  // Bytes from the key of a token to its value, for any view.
  __device__ __forceinline__ std::int64_t ToValue(const Tokens& tokens, std::int32_t token) const {
    return apart() ? Apart(tokens, chunk.Divide(token)) : kv_stride;
  }

  // The chunk of a token, and the token's place in it.
  struct Place {
    std::int32_t chunk, token;
  };
  __device__ __forceinline__ Place Find(const Tokens& tokens, std::int32_t token) const {
    const std::int32_t index = chunk.Divide(token), within = token - index * chunk.divisor;
    return {tokens.table != nullptr ? tokens.table[index] : index, within};
  }
  __device__ __forceinline__ const char* Key(const Tokens& tokens, std::int32_t token) const {
    const Place place = Find(tokens, token);
    return tokens.first + place.chunk * chunk_stride + place.token * token_stride;
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_TOKENS_CUH_
