// The entry points around the tile kernels: load queries, run a span, merge partial results, write outputs.
#ifndef KVPAGE_KERNELS_CPU_ISA_ENTRY_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_ENTRY_INL_H_

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/convert-inl.h"
#include "kernels/cpu/isa/decode-inl.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/math-inl.h"
#include "kernels/cpu/isa/prefill-inl.h"
#include "kernels/cpu/isa/state-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// The kernels for a set without special instructions. A set with more passes Load and Attend a type with the same
// members (see avx512_bf16/path-inl.h).
struct GenericPath {
  // Whether prefill reads only the bfloat16 rows of the queries.
  static constexpr bool PrefillsPairs(DType, bool, bool, int) { return false; }
  template <class T>
  static void Decode(const SpanArgs& args) {
    DecodeSpan<T, FloatLanes>(args);
  }
  template <class T>
  static void Prefill(const SpanArgs& args) {
    PrefillSpan<T, FloatLanes>(args);
  }
};

// Index of row r's query (or output), relative to the sequence's first new token.
KVPAGE_INLINE std::int64_t RowIndex(const QueryTile& tile, int kv_head, int r) {
  const std::int64_t row = tile.first_row + r;
  return row / tile.group * tile.num_q_heads + static_cast<std::int64_t>(kv_head) * tile.group + row % tile.group;
}

template <class Path>
void Load(const LoadArgs& args) {
  const int head_dim = args.tile.head_dim, padded_dim = PaddedDim(head_dim);
  const int padded_rows = PaddedRows(args.tile.rows);
  const std::int64_t row_bytes = static_cast<std::int64_t>(head_dim) * (args.dtype == DType::kF32 ? 4 : 2);
  auto* q16 = reinterpret_cast<std::uint16_t*>(args.dst + padded_rows * padded_dim);
  const bool pairs = args.tile.rows > kDecodeRows &&
                     Path::PrefillsPairs(args.kv_dtype, args.dtype == DType::kBF16, args.exact_weights, head_dim);
  for (int r = 0; r < padded_rows; ++r) {
    const int filled = r < args.tile.rows ? head_dim : 0;
    const char* src = static_cast<const char*>(args.q) + RowIndex(args.tile, args.kv_head, r) * row_bytes;
    if (!pairs) {
      float* q = args.dst + r * padded_dim;
      if (filled > 0) Convert(q, DType::kF32, src, args.dtype, head_dim);
      for (int d = filled; d < padded_dim; ++d) q[d] = 0.0f;
    }
    if (args.dtype == DType::kBF16) {  // bfloat16 rows are used unconverted
      std::uint16_t* to = q16 + r * padded_dim;
      if (filled > 0) __builtin_memcpy(to, src, row_bytes);
      for (int d = filled; d < padded_dim; ++d) to[d] = 0;
    }
  }
}

template <class Path, class T>
void AttendAs(const SpanArgs& args) {
  args.tile.rows <= kDecodeRows ? Path::template Decode<T>(args) : Path::template Prefill<T>(args);
}

template <class Path>
void Attend(const SpanArgs& args) {
  for (int h = 0; h < args.heads && !args.resume; ++h) Clear(StateOf(args, h));
  switch (args.dtype) {
    case DType::kF32:
      return AttendAs<Path, F32>(args);
    case DType::kBF16:
      return AttendAs<Path, BF16>(args);
    case DType::kF16:
      return AttendAs<Path, F16>(args);
    case DType::kI8:
      return AttendAs<Path, I8>(args);
    case DType::kF8E4M3:
      return AttendAs<Path, F8E4M3>(args);
  }
}

void Merge(float* into, const float* from, int rows, int head_dim, float state_scale) {
  MergeStates({into, rows, head_dim}, {from, rows, head_dim}, rows, state_scale);
}

template <class D>
KVPAGE_INLINE void StoreScaled(char* out, const float* acc, VF factor, int head_dim) {
  int d = 0;
  for (; d + W <= head_dim; d += W) StoreAs(D{}, out + d * D::kSize, LoadFloats(acc + d) * factor);
  if (d < head_dim) StoreFirst<D>(out + d * D::kSize, head_dim - d, LoadFloats(acc + d) * factor);
}

void Finish(const FinishArgs& args) {
  const int head_dim = args.tile.head_dim;
  const ConstSoftmaxState state(args.state, args.tile.rows, head_dim);
  const float *max = state.max(), *sum = state.sum(), *exact = state.exact_sum();
  const std::int64_t row_bytes = static_cast<std::int64_t>(head_dim) * (args.dtype == DType::kF32 ? 4 : 2);
  for (int r = 0; r < args.tile.rows; ++r) {
    const std::int64_t index = RowIndex(args.tile, args.kv_head, r);
    const float largest = max[r] * args.state_scale;
    float top = largest, factor = 1.0f, extra = 0.0f;
    if (args.sinks != nullptr) {
      const int head = args.kv_head * args.tile.group + static_cast<int>((args.tile.first_row + r) % args.tile.group);
      const float sink = args.sinks[head];
      if (sink > top || sink != sink) {
        top = sink;
        factor = Exp2((largest - sink) * kLog2E);
        extra = 1.0f;
      } else if (sink != -kInfinity) {
        extra = Exp2((sink - top) * kLog2E);
      }
    }
    if (args.lse != nullptr) {
      // If a score overflows, the row's values are NaN and its lse is infinite, as in the reference implementation.
      args.lse[index] = top == kInfinity ? kInfinity : top + Log(exact[r] * factor + extra);
    }
    const VF inverse = Splat(factor / (sum[r] * factor + extra));
    char* out = static_cast<char*>(args.out) + index * row_bytes;
    const float* acc = state.acc(r);
    WithFloatTag(args.dtype, [&](auto tag) { StoreScaled<decltype(tag)>(out, acc, inverse, head_dim); });
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_ENTRY_INL_H_
