// The state of an online softmax over part of a context: for every query row a weighted sum of values, the largest
// score and the sum of the weights. States over different parts of the context can be merged.
#ifndef KVPAGE_KERNELS_CPU_ISA_STATE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_STATE_INL_H_

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/math-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// View of the StateFloats of one KV head: acc[rows, padded_dim], then max[rows], sum[rows] and exact_sum[rows], with
// the number of rows padded. F is float, or const float for read-only views.
template <class F>
class StateView {
 public:
  KVPAGE_INLINE StateView(F* memory, int rows, int head_dim)
      : acc_(memory), padded_rows_(PaddedRows(rows)), padded_dim_(PaddedDim(head_dim)) {}

  // Weighted sum of values of one row.
  KVPAGE_INLINE F* acc(int row) const { return acc_ + row * padded_dim_; }
  // The largest score, divided by StateScale; -inf if nothing was seen so far.
  KVPAGE_INLINE F* max() const { return acc_ + padded_rows_ * padded_dim_; }
  // Sum of the weights by which the values were multiplied (perhaps rounded to bfloat16), for normalization.
  KVPAGE_INLINE F* sum() const { return max() + padded_rows_; }
  // Sum of the weights before rounding, for lse.
  KVPAGE_INLINE F* exact_sum() const { return sum() + padded_rows_; }

  KVPAGE_INLINE int padded_rows() const { return padded_rows_; }
  KVPAGE_INLINE int padded_dim() const { return padded_dim_; }

 private:
  F* acc_;
  int padded_rows_;
  int padded_dim_;
};
using SoftmaxState = StateView<float>;
using ConstSoftmaxState = StateView<const float>;

// The state of the span's KV head h.
KVPAGE_INLINE SoftmaxState StateOf(const SpanArgs& args, int h) {
  const int rows = args.tile.rows, head_dim = args.tile.head_dim;
  return {args.state + h * StateFloats(rows, head_dim), rows, head_dim};
}

// Initializes the state: nothing seen yet.
KVPAGE_INLINE void Clear(const SoftmaxState& state) {
  for (int i = 0; i < state.padded_rows() * state.padded_dim(); i += W) StoreFloats(state.acc(0) + i, VF{});
  for (int r = 0; r < state.padded_rows(); ++r) {
    state.max()[r] = -kInfinity;
    state.sum()[r] = state.exact_sum()[r] = 0.0f;
  }
}

// Merges `from` into `into`, for `rows` rows.
KVPAGE_INLINE void MergeStates(const SoftmaxState& into, const ConstSoftmaxState& from, int rows, float state_scale) {
  const float unit = state_scale * kLog2E;
  float *max = into.max(), *sum = into.sum(), *exact = into.exact_sum();
  const float *from_max = from.max(), *from_sum = from.sum(), *from_exact = from.exact_sum();
  for (int r = 0; r < rows; ++r) {
    const float top = from_max[r] > max[r] ? from_max[r] : max[r];
    const float keep = max[r] == -kInfinity ? (top == -kInfinity ? 1.0f : 0.0f) : Exp2((max[r] - top) * unit);
    const float take = from_max[r] == -kInfinity ? (top == -kInfinity ? 1.0f : 0.0f) : Exp2((from_max[r] - top) * unit);
    float* a = into.acc(r);
    const float* b = from.acc(r);
    for (int d = 0; d < into.padded_dim(); d += W) {
      StoreFloats(a + d, Fma(LoadFloats(b + d), Splat(take), LoadFloats(a + d) * keep));
    }
    sum[r] = sum[r] * keep + from_sum[r] * take;
    exact[r] = exact[r] * keep + from_exact[r] * take;
    max[r] = top;
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_STATE_INL_H_
