// Copies tokens between slots for edit_slots: the last, partial block of a fork or of a cached prefix.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {
namespace {

// Below this many bytes of keys and values, one thread copies everything.
constexpr std::int64_t kInlineBytes = 1 << 17;

// `count` tokens of a slot, starting at `first`, all in one chunk.
struct Piece {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// Copies one layer's keys (kv = 0) or values (kv = 1).
void CopyPiece(const KVView& view, const TokenCopy& copy, const Piece& piece, std::int64_t layer, int kv) {
  const auto row = static_cast<std::size_t>(view.head_dim) * ItemSize(view.dtype);
  const auto heads = static_cast<std::size_t>(view.num_kv_heads), count = static_cast<std::size_t>(piece.count);
  const auto copy_rows = [&](std::int64_t token, std::int64_t head, std::size_t bytes) {
    std::memcpy(view.At(copy.target, token, layer, kv, head), view.At(copy.source, token, layer, kv, head), bytes);
  };
  const auto copy_scales = [&](std::int64_t token, std::int64_t head, std::size_t scales) {
    std::memcpy(view.Scale(copy.target, token, layer, kv, head), view.Scale(copy.source, token, layer, kv, head),
                scales * sizeof(float));
  };
  const bool quantized = IsQuantized(view.dtype);
  if (view.head_stride == static_cast<std::int64_t>(row)) {  // per_layer: the heads of a token are contiguous
    copy_rows(piece.first, 0, count * heads * row);
    if (quantized) copy_scales(piece.first, 0, count * heads);
    return;
  }
  for (std::int64_t head = 0; head < view.num_kv_heads; ++head) {  // fused: the tokens of a head are contiguous
    copy_rows(piece.first, head, count * row);
    if (quantized) copy_scales(piece.first, head, count);
  }
}

void CopyLayer(const KVView& view, const TokenCopy& copy, std::int64_t layer) {
  for (std::int64_t first = copy.first; first < copy.end();) {
    const std::int64_t chunk_end = (first / view.tokens_per_chunk + 1) * view.tokens_per_chunk;
    const Piece piece = {first, std::min(chunk_end, copy.end()) - first};
    for (const int kv : {0, 1}) CopyPiece(view, copy, piece, layer, kv);
    first += piece.count;
  }
}

}  // namespace

void CopyTokens(const KVView& kv, std::int64_t num_layers, const TokenCopy* copies, std::int64_t num_copies,
                Parallel& parallel) {
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < num_copies; ++i) tokens += copies[i].source >= 0 ? copies[i].count : 0;
  const auto task = [&](std::int64_t i, int) {
    const TokenCopy& copy = copies[i / num_layers];
    if (copy.source >= 0) CopyLayer(kv, copy, i % num_layers);
  };
  const auto token_bytes = static_cast<std::int64_t>(ItemSize(kv.dtype)) * kv.head_dim * kv.num_kv_heads * num_layers;
  if (parallel.num_workers() == 1 || tokens * token_bytes < kInlineBytes) {
    for (std::int64_t i = 0; i < num_copies * num_layers; ++i) task(i, 0);
    return;
  }
  parallel.For(num_copies * num_layers, task);
}

}  // namespace kvpage::cpu
