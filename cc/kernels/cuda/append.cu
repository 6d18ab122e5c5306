// Append: writes new keys and values to the cache, converted to its storage type. One thread block per token.
#include <type_traits>

#include "base/spec_fields.h"
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/quantize.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kThreads = 256;

struct AppendArgs {
  const CheckedBatch* checked;
  const void* k;
  const void* v;
  std::int32_t num_kv_heads;
  std::int32_t head_dim;
  bool last;  // no other kernel of the op follows
};

// The place of a token in the cache.
struct Target {
  std::int64_t position;
  std::int32_t slot;
};

// Waits for the check and finds the token's place; returns false if it has none.
__device__ __forceinline__ bool FindTarget(const CheckedBatch& checked, std::int64_t token, Target* target) {
  WaitForPriorKernel();
  LetNextKernelStart();
  if (checked.ok == 0) return false;
  const std::int32_t s = SequenceOf(checked, token);
  if (s < 0) return false;
  const Sequence& sequence = checked.sequences()[s];
  target->slot = sequence.slot;
  target->position = sequence.position + (token - sequence.query_begin);
  return sequence.slot >= 0;
}

// Elements that a thread converts at a time: at most 16 bytes in either type.
template <class To, class From>
constexpr int kAtOnce = 16 / static_cast<int>(sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));

template <class To, class From, int N>
__device__ __forceinline__ Vector<To, N> Convert(const Vector<From, N>& from) {
  Vector<To, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = FromFloat<To>(ToFloat(from.at[i]));
  return to;
}

template <class To, class From, int N>
__global__ void __launch_bounds__(kThreads) AppendKernel(const __grid_constant__ AppendArgs args) {
  const CheckedBatch& checked = *args.checked;
  const CountedBlock counted(&checked, args.last);
  const std::int64_t token = blockIdx.x;
  Target target;
  if (!FindTarget(checked, token, &target)) return;
  const unsigned row = static_cast<unsigned>(args.num_kv_heads * args.head_dim);
  char* const to_k = checked.view.At(target.slot, target.position, checked.layer, 0, 0);
  const std::int64_t apart = checked.view.At(target.slot, target.position, checked.layer, 1, 0) - to_k;
  for (unsigned i = threadIdx.x * N; i < 2 * row; i += kThreads * N) {
    const bool value = i >= row;
    const unsigned element = value ? i - row : i;
    const unsigned head = element / static_cast<unsigned>(args.head_dim), d = element % args.head_dim;
    const From* const from = static_cast<const From*>(value ? args.v : args.k) + token * row + element;
    char* const to = to_k + (value ? apart : 0) + head * checked.view.head_stride;
    const Vector<From, N> loaded = LoadVector<From, N>(from);
    if constexpr (std::is_same_v<To, From>) {  // preserves the bits of a NaN
      StoreVector<To, N>(reinterpret_cast<To*>(to) + d, loaded);
    } else {
      StoreVector<To, N>(reinterpret_cast<To*>(to) + d, Convert<To, From, N>(loaded));
    }
  }
}

// One warp per row of head_dim elements that share a scale.
template <class To, class From, int N>
__global__ void __launch_bounds__(kThreads) QuantizeKernel(const __grid_constant__ AppendArgs args) {
  const CheckedBatch& checked = *args.checked;
  const CountedBlock counted(&checked, args.last);
  const std::int64_t token = blockIdx.x;
  Target target;
  if (!FindTarget(checked, token, &target)) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int r = static_cast<int>(threadIdx.x) / kWarpSize; r < 2 * args.num_kv_heads; r += kThreads / kWarpSize) {
    const int which = r / args.num_kv_heads, head = r % args.num_kv_heads;
    const From* const from = static_cast<const From*>(which == 0 ? args.k : args.v) +
                             (token * args.num_kv_heads + head) * std::int64_t{args.head_dim};
    unsigned top = 0;
    for (int d = lane * N; d < args.head_dim; d += kWarpSize * N) {
      const Vector<From, N> loaded = LoadVector<From, N>(from + d);
#pragma unroll
      for (int i = 0; i < N; ++i) top = max(top, Magnitude(ToFloat(loaded.at[i])));
    }
    const RowScale<To> scale(__reduce_max_sync(kFullMask, top));
    auto* const to =
        reinterpret_cast<std::uint8_t*>(checked.view.At(target.slot, target.position, checked.layer, which, head));
    for (int d = lane * N; d < args.head_dim; d += kWarpSize * N) {
      const Vector<From, N> loaded = LoadVector<From, N>(from + d);
      unsigned codes = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) codes |= scale.Bits(ToFloat(loaded.at[i])) << 8 * i;
      if constexpr (N == 4) {
        *reinterpret_cast<unsigned*>(to + d) = codes;
      } else {
        to[d] = static_cast<std::uint8_t>(codes);
      }
    }
    if (lane == 0) *checked.view.Scale(target.slot, target.position, checked.layer, which, head) = scale.scale;
  }
}

// Vectorized if all rows are aligned to the vector size, otherwise one element at a time.
template <class To, class From>
Status LaunchFor(const AppendArgs& args, const LaunchShape& shape, Stream stream) {
  constexpr int kVector = kIsQuantized<To> ? 4 : kAtOnce<To, From>;
  const auto address = reinterpret_cast<std::uintptr_t>(args.k) | reinterpret_cast<std::uintptr_t>(args.v);
  const bool aligned = args.head_dim % kVector == 0 && address % (kVector * sizeof(From)) == 0;
  if constexpr (kIsQuantized<To>) {
    return aligned ? Launch<QuantizeKernel<To, From, kVector>>("append", shape, stream, args)
                   : Launch<QuantizeKernel<To, From, 1>>("append", shape, stream, args);
  } else {
    return aligned ? Launch<AppendKernel<To, From, kVector>>("append", shape, stream, args)
                   : Launch<AppendKernel<To, From, 1>>("append", shape, stream, args);
  }
}

}  // namespace

Status LaunchAppend(const CheckedBatch* checked, std::int64_t num_tokens, const AppendOperands& append, DType storage,
                    bool last, Stream stream) {
  if (num_tokens == 0) return {};
  const AppendArgs args = {checked, append.k, append.v, append.num_kv_heads, append.head_dim, last};
  const LaunchShape shape = {static_cast<unsigned>(num_tokens), kThreads, 0, /*overlap=*/true};
  return ForFloat(append.dtype, [&](auto from) {
    return ForStorage(storage, [&](auto to) { return LaunchFor<decltype(to), decltype(from)>(args, shape, stream); });
  });
}

Status AppendKV(const CacheOperands& cache, const BatchOperands& batch, const AppendOperands& append,
                std::uint32_t* new_epoch, void* checked, Stream stream) {
  KVPAGE_RETURN_IF_ERROR(LaunchBatchCheck(
      cache, ToArgs(cache, batch, append.layer, nullptr, /*append=*/true, new_epoch, checked, batch.num_tokens),
      stream));
  const Status launched = LaunchAppend(static_cast<const CheckedBatch*>(checked), batch.num_tokens, append,
                                       static_cast<DType>(cache.spec[kSpecDType]), /*last=*/true, stream);
  return CountOutUnless(launched, checked, batch.num_tokens, stream);
}

}  // namespace kvpage::cuda
