// Fills output rows that belong to no sequence (0 and -inf) or whose check failed (NaN).
#ifndef KVPAGE_KERNELS_CUDA_FILL_CUH_
#define KVPAGE_KERNELS_CUDA_FILL_CUH_

#include <cstdint>

#include "kernels/cuda/check.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Fills rows [from, to) of out and lse.
__device__ inline void FillRows(const AttentionParams& p, std::int64_t from, std::int64_t to, bool bad) {
  const std::int64_t width = std::int64_t{p.num_q_heads} * p.head_dim;
  const std::int64_t begin = from * width, end = to * width;
  if (p.q_dtype == DType::kF32) {
    const std::uint32_t bits = bad ? 0x7fc00000u : 0u;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) static_cast<std::uint32_t*>(p.out)[i] = bits;
  } else {
    const std::uint16_t bits = bad ? (p.q_dtype == DType::kBF16 ? 0x7fc0 : 0x7e00) : 0;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) static_cast<std::uint16_t*>(p.out)[i] = bits;
  }
  if (p.lse == nullptr) return;
  const float lse = __int_as_float(bad ? 0x7fc00000 : static_cast<int>(0xff800000));
  for (std::int64_t i = from * p.num_q_heads + threadIdx.x; i < to * p.num_q_heads; i += kThreads) p.lse[i] = lse;
}

// Fills the rows between the previous active sequence and sequence `index`, and those of the sequence itself if it is
// bad.
__device__ inline void FillGap(const AttentionParams& p, std::int32_t index) {
  const Sequence* sequences = p.checked->sequences();
  const bool rest = index == p.num_sequences;
  std::int64_t begin = p.num_tokens, end = p.num_tokens;
  bool bad = false;
  if (!rest) {
    const Sequence s = sequences[index];
    if ((s.slot < 0 && s.slot != kWrongSequence) || s.query_length <= 0) return;
    begin = s.query_begin;
    end = begin + s.query_length;
    bad = s.slot == kWrongSequence;
  }
  // The end of the last active (or bad) sequence before it; sequences are in ascending order.
  KVPAGE_SHARED(std::int32_t, owned);
  __syncthreads();
  if (threadIdx.x == 0) owned = 0;
  __syncthreads();
  std::int32_t last = 0;
  for (std::int32_t i = threadIdx.x; i < index; i += kThreads) {
    const Sequence s = sequences[i];
    if ((s.slot >= 0 || s.slot == kWrongSequence) && s.query_length > 0)
      last = max(last, s.query_begin + s.query_length);
  }
  if (last > 0) atomicMax(&owned, last);
  __syncthreads();
  FillRows(p, owned, begin, false);
  if (bad) FillRows(p, begin, end, true);
}

// Fills all rows that the attention kernels do not write. The rows are distributed over the blocks of one of these
// kernels.
__device__ inline void FillRest(const AttentionParams& p) {
  const int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (p.checked->ok != 0) {
    for (std::int32_t i = first; i <= p.num_sequences; i += blocks) FillGap(p, i);
  } else {
    const std::int64_t step = CeilDiv(p.num_tokens, blocks);
    FillRows(p, min(first * step, p.num_tokens), min((first + 1) * step, p.num_tokens), true);
  }
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_FILL_CUH_
