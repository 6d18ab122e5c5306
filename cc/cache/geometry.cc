#include "cache/geometry.h"

#include <cstring>
#include <limits>

namespace kvpage {
namespace {

// a * b, or an error if the product does not fit into int64 (the virtual size of a spec may not).
Status Multiply(std::int64_t a, std::int64_t b, std::int64_t* out) {
  if (__builtin_mul_overflow(a, b, out)) return InvalidArgument("the spec's virtual size does not fit 63 bits");
  return {};
}

}  // namespace

Status Geometry::Make(const SpecInts& spec, std::int64_t block_bytes, Geometry* out) {
  for (int i = 0; i < kNumSpecFields; ++i) {
    if (spec[i] < (IsSpecCode(i) ? 0 : 1) || spec[i] > std::numeric_limits<std::int32_t>::max()) {
      return InvalidArgument(std::string(kSpecFieldNames[i]) + " is " + std::to_string(spec[i]) +
                             ", wanted a positive int32");
    }
  }
  if (spec[kSpecDType] >= kNumDTypes) return InvalidArgument("unknown dtype code " + std::to_string(spec[kSpecDType]));
  if (spec[kSpecLayout] > 1) return InvalidArgument("unknown layout code " + std::to_string(spec[kSpecLayout]));
  Geometry g;
  g.num_layers = spec[kSpecNumLayers];
  g.num_kv_heads = spec[kSpecNumKVHeads];
  g.head_dim = spec[kSpecHeadDim];
  g.max_slots = spec[kSpecMaxSlots];
  g.max_seq_len = spec[kSpecMaxSeqLen];
  g.dtype = static_cast<DType>(spec[kSpecDType]);
  g.layout = static_cast<Layout>(spec[kSpecLayout]);
  g.block_tokens = spec[kSpecBlockTokens];
  g.block_bytes = block_bytes;

  std::int64_t token = static_cast<std::int64_t>(ItemSize(g.dtype));
  KVPAGE_RETURN_IF_ERROR(Multiply(token, g.head_dim, &token));
  token += static_cast<std::int64_t>(ScaleSize(g.dtype));  // cannot overflow, since head_dim is an int32
  KVPAGE_RETURN_IF_ERROR(Multiply(token, g.num_kv_heads, &token));
  if (g.layout == Layout::kFused) KVPAGE_RETURN_IF_ERROR(Multiply(token, 2 * g.num_layers, &token));
  std::int64_t needed = 0;
  KVPAGE_RETURN_IF_ERROR(Multiply(token, g.block_tokens, &needed));
  const bool dense = g.layout == Layout::kPerLayer && !IsQuantized(g.dtype);
  if (block_bytes < needed || (dense && block_bytes != needed)) {
    return InvalidArgument("a block of " + std::to_string(g.block_tokens) + " tokens takes " + std::to_string(needed) +
                           " bytes, block_bytes is " + std::to_string(block_bytes));
  }
  std::int64_t bytes = block_bytes;
  for (std::int64_t factor : {g.max_blocks(), g.num_ranges(), g.max_slots}) {
    KVPAGE_RETURN_IF_ERROR(Multiply(bytes, factor, &bytes));
  }
  *out = g;
  return {};
}

KVView Geometry::View(char* base) const {
  const std::int64_t item = static_cast<std::int64_t>(ItemSize(dtype));
  KVView view;
  view.base = base;
  view.dtype = dtype;
  view.num_kv_heads = static_cast<std::int32_t>(num_kv_heads);
  view.head_dim = static_cast<std::int32_t>(head_dim);
  view.tokens_per_chunk = block_tokens;
  view.chunk_stride = block_bytes;
  view.slot_stride = range_bytes();
  if (layout == Layout::kFused) {
    view.token_stride = head_dim * item;
    view.head_stride = block_tokens * view.token_stride;
    view.kv_stride = block_tokens * row_bytes();
    view.layer_stride = 2 * view.kv_stride;
  } else {
    view.head_stride = head_dim * item;
    view.token_stride = num_kv_heads * view.head_stride;
    view.kv_stride = max_slots * range_bytes();
    view.layer_stride = 2 * view.kv_stride;
  }
  if (IsQuantized(dtype)) {
    const auto scale = static_cast<std::int64_t>(ScaleSize(dtype));
    view.scale_base = block_tokens * data_bytes();  // a multiple of 16, because block_tokens is
    view.scale_head_stride = layout == Layout::kFused ? block_tokens * scale : scale;
    view.scale_token_stride = layout == Layout::kFused ? scale : num_kv_heads * scale;
  }
  return view;
}

void Geometry::ZeroToken(const KVView& view, std::int64_t slot, std::int64_t token, std::int64_t layer) const {
  const auto row = static_cast<std::size_t>(head_dim) * ItemSize(dtype);
  for (std::int64_t head = 0; head < num_kv_heads; ++head) {
    for (int kv = 0; kv < 2; ++kv) {
      std::memset(view.At(slot, token, layer, kv, head), 0, row);
      if (IsQuantized(dtype)) *view.Scale(slot, token, layer, kv, head) = 0.0f;
    }
  }
}

void Geometry::ZeroTokens(char* block, std::int64_t first) const {
  KVView view = View(block);
  if (layout == Layout::kPerLayer) {
    view.kv_stride = block_bytes;
    view.layer_stride = 2 * block_bytes;
  }
  for (std::int64_t token = first; token < block_tokens; ++token) {
    for (std::int64_t layer = 0; layer < num_layers; ++layer) ZeroToken(view, 0, token, layer);
  }
}

KVView Geometry::TableView(char* window) const {
  KVView view = View(window);
  view.slot_stride = 0;
  if (layout == Layout::kPerLayer) view.kv_stride = view.layer_stride = 0;  // the table has the blocks of a layer
  return view;
}

std::string DescribeDifference(const SpecInts& program, const SpecInts& pool) {
  std::string text;
  for (int i = 0; i < kNumSpecFields; ++i) {
    if (program[i] == pool[i]) continue;
    if (!text.empty()) text += "; ";
    text += std::string(kSpecFieldNames[i]) + (IsSpecCode(i) ? " code is " : " is ") + std::to_string(program[i]) +
            " in the program, " + std::to_string(pool[i]) + " in the pool";
  }
  return text;
}

}  // namespace kvpage
