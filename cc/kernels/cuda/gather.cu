// Gather: copies contexts from the cache to dense arrays, for the pure-JAX implementation and for tests. Quantized
// elements are dequantized to float32.
#include <type_traits>

#include "base/spec_fields.h"
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/elements.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerBlock = 16;

struct GatherArgs {
  const CheckedBatch* checked;
  void* k;  // [num_sequences, row_tokens, num_kv_heads, head_dim]
  void* v;
  std::int64_t row_tokens;
  std::int64_t tiles;  // per sequence, of kTokensPerBlock tokens each
  std::int32_t num_kv_heads;
  std::int32_t head_dim;
};

template <class Stored>
using Gathered = std::conditional_t<kIsQuantized<Stored>, float, Stored>;

template <class Stored, int N>
__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ GatherArgs args) {
  using Out = Gathered<Stored>;
  const CountedBlock counted(args.checked, /*last=*/true);
  WaitForPriorKernel();
  const CheckedBatch& checked = *args.checked;
  const std::int64_t s = blockIdx.x / args.tiles, begin = blockIdx.x % args.tiles * kTokensPerBlock;
  const std::int64_t end = begin + kTokensPerBlock < args.row_tokens ? begin + kTokensPerBlock : args.row_tokens;
  const bool ok = checked.ok != 0;
  const std::int32_t slot = ok ? checked.sequences()[s].slot : -1;
  const std::int64_t valid = slot >= 0 ? checked.sequences()[s].end() : 0;
  const Out filler = ok ? Out{} : NaN<Out>();
  const std::int64_t row = std::int64_t{args.num_kv_heads} * args.head_dim;
  for (std::int64_t i = threadIdx.x * N; i < 2 * (end - begin) * row; i += kThreads * N) {
    const int which = i >= (end - begin) * row;
    const std::int64_t element = which != 0 ? i - (end - begin) * row : i;
    const std::int64_t token = begin + element / row;
    const int head = static_cast<int>(element % row / args.head_dim), d = static_cast<int>(element % args.head_dim);
    Vector<Out, N> out;
    if (token < valid) {
      const auto* const from =
          reinterpret_cast<const Stored*>(checked.view.At(slot, token, checked.layer, which, head));
      if constexpr (kIsQuantized<Stored>) {
        const float scale = *checked.view.Scale(slot, token, checked.layer, which, head);
        const Vector<Stored, N> loaded = LoadVector<Stored, N>(from + d);
#pragma unroll
        for (int n = 0; n < N; ++n) out.at[n] = ToFloat(loaded.at[n]) * scale;
      } else {
        out = LoadVector<Stored, N>(from + d);
      }
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) out.at[n] = filler;
    }
    StoreVector<Out, N>(static_cast<Out*>(which != 0 ? args.v : args.k) + (s * args.row_tokens + begin) * row + element,
                        out);
  }
}

template <class Stored>
Status LaunchGather(const GatherArgs& args, std::int64_t blocks, Stream stream) {
  constexpr int kVector = kVectorElements<Gathered<Stored>>;
  const auto address = reinterpret_cast<std::uintptr_t>(args.k) | reinterpret_cast<std::uintptr_t>(args.v);
  const bool aligned = args.head_dim % kVector == 0 && address % 16 == 0;
  const LaunchShape shape = {static_cast<unsigned>(blocks), kThreads, 0, /*overlap=*/true};
  return aligned ? Launch<GatherKernel<Stored, kVector>>("gather", shape, stream, args)
                 : Launch<GatherKernel<Stored, 1>>("gather", shape, stream, args);
}

}  // namespace

Status GatherContext(const CacheOperands& cache, const BatchOperands& batch, const std::int32_t* layer,
                     std::int64_t row_tokens, void* k, void* v, void* checked, Stream stream) {
  const std::int64_t tiles = CeilDiv(row_tokens, kTokensPerBlock), blocks = batch.num_sequences * tiles;
  KVPAGE_RETURN_IF_ERROR(LaunchBatchCheck(
      cache, ToArgs(cache, batch, layer, nullptr, /*append=*/false, nullptr, checked, blocks), stream));
  const GatherArgs args = {static_cast<const CheckedBatch*>(checked),
                           k,
                           v,
                           row_tokens,
                           tiles,
                           static_cast<std::int32_t>(cache.spec[kSpecNumKVHeads]),
                           static_cast<std::int32_t>(cache.spec[kSpecHeadDim])};
  if (blocks == 0) return {};
  const Status launched = ForStorage(static_cast<DType>(cache.spec[kSpecDType]),
                                     [&](auto stored) { return LaunchGather<decltype(stored)>(args, blocks, stream); });
  return CountOutUnless(launched, checked, blocks, stream);
}

}  // namespace kvpage::cuda
