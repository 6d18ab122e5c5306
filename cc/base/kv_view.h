// KVView: the addresses of keys and values, for every layout and every kernel.
//
// A plain struct of 64-bit byte strides describes the fused and the per-layer arena as well as separate K and V page
// arrays behind a block table, so that each kernel is written once. The address of (slot, layer, K|V, head, token) is
//
//   base + SlotChunk(slot, token / tokens_per_chunk) + layer * layer_stride + kv * kv_stride
//        + head * head_stride + (token % tokens_per_chunk) * token_stride
//
// where a chunk is a run of tokens with a constant stride. Without a table, chunk i of a slot is at slot * slot_stride
// + i * chunk_stride. With a table, it is at table[slot][i] * chunk_stride or, if keys and values are in different
// physical chunks (values_apart), at table[slot][kv][i] * chunk_stride.
//
// Quantized storage (see dtype.h) has the scale of (slot, layer, K|V, head, token) in the same chunk, scale_base bytes
// after the chunk's first element of that layer and side:
//
//   Chunk(slot, token / tokens_per_chunk, layer, kv) + scale_base + head * scale_head_stride
//        + (token % tokens_per_chunk) * scale_token_stride
#ifndef KVPAGE_BASE_KV_VIEW_H_
#define KVPAGE_BASE_KV_VIEW_H_

#include <cstdint>

#include "base/dtype.h"
#include "base/host_device.h"

namespace kvpage {

struct KVView {
  char* base = nullptr;
  std::int64_t slot_stride = 0;
  std::int64_t chunk_stride = 0;
  std::int64_t layer_stride = 0;
  std::int64_t kv_stride = 0;  // from a key to its value; may be any distance, also negative
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t tokens_per_chunk = 1;
  std::int64_t scale_base = 0;  // these three are only used if dtype is quantized
  std::int64_t scale_head_stride = 0;
  std::int64_t scale_token_stride = 0;
  // [slots, table_width] physical chunk numbers, or null. Numbers of values are table_kv_stride after those of their
  // keys.
  const std::int32_t* table = nullptr;
  std::int64_t table_width = 0;
  std::int64_t table_kv_stride = 0;
  DType dtype = DType::kF32;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;  // the elements of a head are contiguous

  // Whether values have separate chunks instead of following their keys by kv_stride bytes.
  KVPAGE_HOST_DEVICE bool values_apart() const { return table_kv_stride != 0; }
  // Address of chunk `chunk` of `slot` for head 0 and the chunk's token 0; kv is 0 for keys, 1 for values.
  KVPAGE_HOST_DEVICE char* Chunk(std::int64_t slot, std::int64_t chunk, std::int64_t layer, int kv) const {
    const std::int64_t place =
        table != nullptr ? std::int64_t{table[slot * table_width + kv * table_kv_stride + chunk]} * chunk_stride
                         : slot * slot_stride + chunk * chunk_stride;
    return base + place + layer * layer_stride + kv * kv_stride;
  }
  KVPAGE_HOST_DEVICE char* At(std::int64_t slot, std::int64_t token, std::int64_t layer, int kv,
                              std::int64_t head) const {
    return Chunk(slot, token / tokens_per_chunk, layer, kv) + head * head_stride +
           (token % tokens_per_chunk) * token_stride;
  }
  KVPAGE_HOST_DEVICE float* Scale(std::int64_t slot, std::int64_t token, std::int64_t layer, int kv,
                                  std::int64_t head) const {
    return reinterpret_cast<float*>(Chunk(slot, token / tokens_per_chunk, layer, kv) + scale_base +
                                    head * scale_head_stride + (token % tokens_per_chunk) * scale_token_stride);
  }
};

// A sequence of a ragged batch as kernels see it: validated, active (slot >= 0) and with at least one new token.
struct Sequence {
  std::int32_t slot = 0;         // row of the view (or of the block table)
  std::int32_t query_begin = 0;  // its first new token in q, k, v and out
  std::int32_t query_length = 0;
  std::int32_t position = 0;  // position of its first new token, which is the number of tokens before it

  // Number of tokens, including the new ones.
  KVPAGE_HOST_DEVICE std::int64_t end() const { return std::int64_t{position} + query_length; }
  // The first position that any of the new tokens sees with this window (<= 0: no window). Kernels read no position
  // before it.
  KVPAGE_HOST_DEVICE std::int64_t FirstVisible(std::int32_t window) const {
    return window > 0 && position >= window ? std::int64_t{position} - window + 1 : 0;
  }
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_KV_VIEW_H_
