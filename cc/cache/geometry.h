// Geometry: the resolved cache spec in C++, and the layout of a slot's blocks in virtual memory.
//
// fused      one range per slot; a block holds block_tokens tokens of every layer: [layer][K|V][head][token][D]
// per_layer  2L ranges; range 2l is layer l's K and 2l+1 its V, each [slot][token][head][D], so that one layer's K is
//            one dense array over all slots
//
// In quantized storage, scales follow the data of each part of a block: [layer][K|V]([head][token][D] [head][token])
// and [block]([token][head][D] [token][head]). A per-layer slot is then not a dense array, so its blocks may be padded
// too.
#ifndef KVPAGE_CACHE_GEOMETRY_H_
#define KVPAGE_CACHE_GEOMETRY_H_

#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "base/kv_view.h"
#include "base/spec_fields.h"
#include "base/status.h"

namespace kvpage {

enum class Layout : std::int32_t { kFused = 0, kPerLayer = 1 };

struct Geometry {
  std::int64_t num_layers = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_slots = 0;
  std::int64_t max_seq_len = 0;
  DType dtype = DType::kF32;
  Layout layout = Layout::kFused;
  std::int64_t block_tokens = 0;
  std::int64_t block_bytes = 0;

  static Status Make(const SpecInts& spec, std::int64_t block_bytes, Geometry* out);

  SpecInts spec() const {
    return {num_layers,
            num_kv_heads,
            head_dim,
            max_slots,
            max_seq_len,
            static_cast<std::int64_t>(dtype),
            static_cast<std::int64_t>(layout),
            block_tokens};
  }

  // Bytes of one token's K (or V) in one layer, over all heads: elements only, and including their scales.
  std::int64_t data_bytes() const { return num_kv_heads * head_dim * static_cast<std::int64_t>(ItemSize(dtype)); }
  std::int64_t row_bytes() const { return data_bytes() + num_kv_heads * static_cast<std::int64_t>(ScaleSize(dtype)); }
  std::int64_t token_bytes() const { return 2 * num_layers * row_bytes(); }
  std::int64_t num_ranges() const { return layout == Layout::kFused ? 1 : 2 * num_layers; }
  // Number of blocks in each range of a full slot.
  std::int64_t max_blocks() const { return (max_seq_len + block_tokens - 1) / block_tokens; }
  std::int64_t range_bytes() const { return max_blocks() * block_bytes; }
  std::int64_t slot_bytes() const { return num_ranges() * range_bytes(); }
  std::int64_t virtual_bytes() const { return max_slots * slot_bytes(); }
  // Number of blocks that `tokens` tokens need in each range.
  std::int64_t BlocksFor(std::int64_t tokens) const { return (tokens + block_tokens - 1) / block_tokens; }
  // Byte offset in virtual memory of block `block` of a slot in a range.
  std::int64_t Offset(std::int64_t slot, std::int64_t range, std::int64_t block) const {
    return (range * max_slots + slot) * range_bytes() + block * block_bytes;
  }

  KVView View(char* base) const;
  // Zeroes a token's key, value and scales through a view.
  void ZeroToken(const KVView& view, std::int64_t slot, std::int64_t token, std::int64_t layer) const;
  // Zeroes the tokens from `first` on in a logical block whose ranges are stored one after the other.
  void ZeroTokens(char* block, std::int64_t first) const;
  // The view of one layer through a block table whose chunks are blocks in the window: see KVView::table. The caller
  // sets the table.
  KVView TableView(char* window) const;
  // Number of ranges of a layer that have rows in a table: one for keys, and one for values if they are in other
  // blocks.
  std::int64_t table_ranges() const { return layout == Layout::kFused ? 1 : 2; }
  std::int64_t TableRange(std::int64_t layer, std::int64_t kind) const {
    return layout == Layout::kFused ? 0 : 2 * layer + kind;
  }
};

// Returns "max_slots is 8 in the program, 4 in the pool; ...", or "" if they are equal.
std::string DescribeDifference(const SpecInts& program, const SpecInts& pool);

}  // namespace kvpage

#endif  // KVPAGE_CACHE_GEOMETRY_H_
