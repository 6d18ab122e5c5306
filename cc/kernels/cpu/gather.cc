// Gather: copies contexts from the cache into dense arrays, for the pure-JAX implementation and for tests. Quantized
// elements are dequantized to float32.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {
namespace {

constexpr std::int64_t kTokensPerTask = 64;
constexpr std::int64_t kInlineBytes = 1 << 17;

std::size_t OutputSize(DType stored) { return IsQuantized(stored) ? sizeof(float) : ItemSize(stored); }

// Copies tokens [from, to) of one row of the output.
void CopyTokens(const GatherArgs& args, std::int64_t row, std::int64_t from, std::int64_t to) {
  const KVView& kv = args.kv;
  const GatherArgs::Row& source = (*args.rows)[row];
  const auto head_bytes = static_cast<std::int64_t>(kv.head_dim * OutputSize(kv.dtype));
  const std::int64_t token_bytes = head_bytes * kv.num_kv_heads;
  const std::int64_t valid = source.slot < 0 ? 0 : source.num_tokens;
  for (int which = 0; which < 2; ++which) {
    char* out = static_cast<char*>(which == 0 ? args.k : args.v) + row * args.row_tokens * token_bytes;
    for (std::int64_t token = from; token < std::min(to, valid); ++token) {
      const char* src = kv.At(source.slot, token, args.layer, which, 0);
      if (IsQuantized(kv.dtype)) {
        for (int head = 0; head < kv.num_kv_heads; ++head) {
          ActiveKernels().dequantize(reinterpret_cast<float*>(out + token * token_bytes + head * head_bytes),
                                     src + head * kv.head_stride, kv.dtype,
                                     *kv.Scale(source.slot, token, args.layer, which, head), kv.head_dim);
        }
        continue;
      }
      if (kv.head_stride == head_bytes) {
        std::memcpy(out + token * token_bytes, src, token_bytes);
        continue;
      }
      for (int head = 0; head < kv.num_kv_heads; ++head) {
        std::memcpy(out + token * token_bytes + head * head_bytes, src + head * kv.head_stride, head_bytes);
      }
    }
    const std::int64_t rest = std::max(from, std::min(to, valid));
    if (rest < to) std::memset(out + rest * token_bytes, 0, (to - rest) * token_bytes);
  }
}

}  // namespace

void Gather(const GatherArgs& args, Parallel& parallel) {
  const auto rows = static_cast<std::int64_t>(args.rows->size());
  const auto row_bytes =
      static_cast<std::int64_t>(args.row_tokens * args.kv.num_kv_heads * args.kv.head_dim * OutputSize(args.kv.dtype));
  if (parallel.num_workers() == 1 || rows * row_bytes < kInlineBytes) {
    for (std::int64_t row = 0; row < rows; ++row) CopyTokens(args, row, 0, args.row_tokens);
    return;
  }
  const std::int64_t pieces = (args.row_tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel.For(rows * pieces, [&](std::int64_t task, int) {
    const std::int64_t from = task % pieces * kTokensPerTask;
    CopyTokens(args, task / pieces, from, std::min(from + kTokensPerTask, args.row_tokens));
  });
}

}  // namespace kvpage::cpu
