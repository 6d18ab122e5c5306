// The copies of edit_slots: tokens of a slot to the same positions of another slot, in a launch after the check.
#ifndef KVPAGE_KERNELS_CUDA_COPY_TOKENS_CUH_
#define KVPAGE_KERNELS_CUDA_COPY_TOKENS_CUH_

#include "kernels/cuda/check.cuh"
#include "kernels/cuda/elements.cuh"

namespace kvpage::cuda {

inline constexpr int kCopyThreads = 256;
// Blocks that share the tokens of a copy's keys or values in one layer. Few, because a partial block is small.
inline constexpr int kCopyPieces = 4;

struct CopyArgs {
  const CheckedBatch* checked;
  const TokenCopy* copies;
  std::int32_t num_layers;
  std::int32_t row_bytes;  // per head and token
  bool scales;
};

// Copies every kCopyPieces-th token of one copy's keys or values in one layer, N bytes at a time.
template <int N>
__global__ void __launch_bounds__(kCopyThreads) CopyTokensKernel(const __grid_constant__ CopyArgs args) {
  using Bytes = Vector<std::uint8_t, N>;
  const CountedBlock counted(args.checked, /*last=*/true);
  WaitForPriorKernel();
  const CheckedBatch& checked = *args.checked;
  if (checked.ok == 0) return;
  std::int64_t block = blockIdx.x;
  const int piece = static_cast<int>(block % kCopyPieces), kv = static_cast<int>(block / kCopyPieces % 2);
  block /= 2 * kCopyPieces;
  const std::int64_t layer = block % args.num_layers;
  const TokenCopy copy = args.copies[block / args.num_layers];
  if (copy.source == -1) return;
  const KVView& view = checked.view;
  const std::int64_t tokens = CeilDiv(copy.count - piece, kCopyPieces), rows = tokens * view.num_kv_heads;
  const auto token = [&](std::int64_t row) { return copy.first + piece + row / view.num_kv_heads * kCopyPieces; };
  const std::int64_t vectors = args.row_bytes / N;
  for (std::int64_t i = threadIdx.x; i < rows * vectors; i += kCopyThreads) {
    const std::int64_t row = i / vectors, head = row % view.num_kv_heads, at = i % vectors * N;
    const char* const from = view.At(copy.source, token(row), layer, kv, head) + at;
    char* const to = view.At(copy.target, token(row), layer, kv, head) + at;
    *reinterpret_cast<Bytes*>(to) = *reinterpret_cast<const Bytes*>(from);
  }
  if (!args.scales) return;
  for (std::int64_t row = threadIdx.x; row < rows; row += kCopyThreads) {
    const std::int64_t head = row % view.num_kv_heads;
    *view.Scale(copy.target, token(row), layer, kv, head) = *view.Scale(copy.source, token(row), layer, kv, head);
  }
}

inline std::int64_t NumCopyBlocks(const CacheOperands& cache, const EditList& list) {
  return list.num_copies * cache.spec[kSpecNumLayers] * 2 * kCopyPieces;
}

inline Status LaunchCopies(const CacheOperands& cache, const EditList& list, const CheckedBatch* checked,
                           Stream stream) {
  const auto dtype = static_cast<DType>(cache.spec[kSpecDType]);
  const CopyArgs args = {
      checked, list.copies, static_cast<std::int32_t>(cache.spec[kSpecNumLayers]),
      static_cast<std::int32_t>(cache.spec[kSpecHeadDim] * static_cast<std::int64_t>(ItemSize(dtype))),
      IsQuantized(dtype)};
  const LaunchShape shape = {static_cast<unsigned>(NumCopyBlocks(cache, list)), kCopyThreads, 0, /*overlap=*/true};
  // Row addresses are multiples of the row length.
  if (args.row_bytes % 16 == 0) return Launch<CopyTokensKernel<16>>("copy_tokens", shape, stream, args);
  if (args.row_bytes % 4 == 0) return Launch<CopyTokensKernel<4>>("copy_tokens", shape, stream, args);
  return Launch<CopyTokensKernel<1>>("copy_tokens", shape, stream, args);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_COPY_TOKENS_CUH_
