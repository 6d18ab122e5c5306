// Query rows in memory: the place of a row in q, out and lse, and access to elements of any query type.
#ifndef KVPAGE_KERNELS_CUDA_ROWS_CUH_
#define KVPAGE_KERNELS_CUDA_ROWS_CUH_

#include <cstdint>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// For row `row` of a sequence and KV head: its index in q and out, in rows of head_dim elements (and in lse), its query
// head, and the position of its query token.
__device__ __forceinline__ std::int64_t RowIndex(const AttentionParams& p, const Sequence& sequence, std::int32_t head,
                                                 std::int32_t row) {
  const std::int32_t token = row / p.group;
  return (std::int64_t{sequence.query_begin} + token) * p.num_q_heads + head * p.group + (row - token * p.group);
}
__device__ __forceinline__ std::int32_t RowHead(const AttentionParams& p, std::int32_t head, std::int32_t row) {
  return head * p.group + row % p.group;
}
__device__ __forceinline__ std::int32_t RowPosition(const AttentionParams& p, const Sequence& sequence,
                                                    std::int32_t row) {
  return sequence.position + row / p.group;
}

// The same for row `row` of a unit's tile.
__device__ __forceinline__ std::int64_t RowIndex(const AttentionParams& p, const WorkUnit& unit, std::int32_t row) {
  return RowIndex(p, unit.sequence, unit.head, unit.first_row + row);
}
__device__ __forceinline__ std::int32_t RowHead(const AttentionParams& p, const WorkUnit& unit, std::int32_t row) {
  return RowHead(p, unit.head, unit.first_row + row);
}
__device__ __forceinline__ std::int32_t RowPosition(const AttentionParams& p, const WorkUnit& unit, std::int32_t row) {
  return RowPosition(p, unit.sequence, unit.first_row + row);
}

// Elements of q and out.
__device__ __forceinline__ void StoreElement(void* out, DType dtype, std::int64_t index, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(out)[index] = x;
  } else if (dtype == DType::kBF16) {
    static_cast<__nv_bfloat16*>(out)[index] = FromFloat<__nv_bfloat16>(x);
  } else {
    static_cast<__half*>(out)[index] = FromFloat<__half>(x);
  }
}
__device__ __forceinline__ float LoadElement(const void* p, DType dtype, std::int64_t index) {
  if (dtype == DType::kF32) return static_cast<const float*>(p)[index];
  if (dtype == DType::kBF16) return ToFloat(static_cast<const __nv_bfloat16*>(p)[index]);
  return ToFloat(static_cast<const __half*>(p)[index]);
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_ROWS_CUH_
