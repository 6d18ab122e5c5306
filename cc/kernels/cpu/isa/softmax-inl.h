// From the raw dot products of a tile to weights: scale, soft cap, ALiBi, mask, online softmax.
#ifndef KVPAGE_KERNELS_CPU_ISA_SOFTMAX_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_SOFTMAX_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/math-inl.h"
#include "kernels/cpu/isa/state-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// The keys of the tile at [begin, begin + size) that a row sees: [from, to), empty if to <= from.
struct Visible {
  int from;
  int to;
};

KVPAGE_INLINE Visible VisibleTo(std::int64_t position, std::int32_t window, std::int64_t begin, int size) {
  std::int64_t from = window > 0 ? position - window + 1 - begin : 0;
  std::int64_t to = position + 1 - begin;
  if (from < 0) from = 0;
  if (from > size) from = size;
  if (to > size) to = size;
  if (to < from) to = from;
  return {static_cast<int>(from), static_cast<int>(to)};
}

// Rows processed together in the softmax, so that their chains of dependent steps overlap.
constexpr int kSoftmaxRows = kRowBlock;
static_assert(kDecodeRows <= kSoftmaxRows);

struct SoftmaxArgs {
  const SpanArgs& span;
  const float* slopes;  // of the KV head's group, or null
  std::int64_t begin;   // position of the first key
  int size;
  int stride = kTileTokens;             // between rows of scores
  const float* value_scales = nullptr;  // of quantized values; weights are multiplied by them
};

// Applies scale, soft cap and ALiBi to a row's scores, in place.
KVPAGE_INLINE void BendScores(const SoftmaxArgs& args, int row, int padded, float* scores) {
  const SpanArgs& span = args.span;
  const float slope = args.slopes == nullptr ? 0.0f : args.slopes[(span.tile.first_row + row) % span.tile.group];
  const float offset = static_cast<float>(args.begin - span.positions[row]);
  for (int j = 0; j < padded; j += W) {
    VF s = LoadFloats(scores + j) * span.scale;
    if (span.soft_cap > 0.0f) s = Tanh(s / span.soft_cap) * span.soft_cap;
    if (slope != 0.0f) s = Fma(Splat(slope), __builtin_convertvector(Iota() + j, VF) + offset, s);
    StoreFloats(scores + j, s);
  }
}

// Sets scores to -inf where the row does not see the key; returns the largest score in each lane. Calls see(j, scores)
// with the masked scores starting at j.
template <class See>
KVPAGE_INLINE VF MaskScores(Visible visible, int padded, float* scores, See&& see) {
  VF top = Splat(-kInfinity);
  for (int j = 0; j < padded; j += W) {
    VF s = LoadFloats(scores + j);
    if (j < visible.from || j + W > visible.to) {
      const VI index = Iota() + j;
      s = ((index >= visible.from) & (index < visible.to)) ? s : Splat(-kInfinity);
      StoreFloats(scores + j, s);
    }
    top = Max(s, top);
    see(j, s);
  }
  return top;
}

// 2^((score - base) * unit), the weights of W scores, none of which is above `base`. The difference is computed first:
// it is 0 for the largest score and negative for all others, even for huge scores. A fused score * unit - base * unit
// would be off by the rounding error of base * unit.
KVPAGE_INLINE VF Weights(const float* scores, VF base, VF unit) { return Exp2((LoadFloats(scores) - base) * unit); }

// Turns scores into weights in the lanes of L. Returns the sum of the weights; *exact is their sum before rounding.
KVPAGE_INLINE float Weigh(FloatLanes, int padded, VF base, VF unit, float* scores, float* exact) {
  VF total = {};
  for (int j = 0; j < padded; j += W) {
    const VF p = Weights(scores + j, base, unit);
    StoreFloats(scores + j, p);
    total += p;
  }
  return *exact = SumOf(total);
}

// The same for quantized values: weights are multiplied by the values' scales, but their sum is not. A weight is 0
// where the row does not see the key, even if the scale there is not finite.
KVPAGE_INLINE VF Scaled(VF weights, const float* scales, Visible visible, int j) {
  const VI index = Iota() + j;
  const VF scaled = weights * LoadFloats(scales + j);
  return ((index >= visible.from) & (index < visible.to)) ? scaled : VF{};
}
KVPAGE_INLINE float WeighScaled(FloatLanes, const float* scales, Visible visible, int padded, VF base, VF unit,
                                float* scores) {
  VF total = {};
  for (int j = 0; j < padded; j += W) {
    const VF p = Weights(scores + j, base, unit);
    StoreFloats(scores + j, Scaled(p, scales, visible, j));
    total += p;
  }
  return SumOf(total);
}

// Turns the scores of rows first .. first + count - 1 into weights e^(score - max), 0 where a row does not see the key,
// and updates max and sums of `state`. correction[r] is the factor for a row's accumulator. The arrays start at row
// `first`; count <= kSoftmaxRows. `residuals` receives the differences between the weights and their rounded values, if
// L has residuals; null if they are not wanted.
template <class L>
void Softmax(const SoftmaxArgs& args, const SoftmaxState& state, int first, int count, const Visible* visible,
             float* scores, float* correction, typename L::BlockResiduals* residuals = nullptr) {
  constexpr int kStep = L::kElements * W;
  const int padded = (args.size + kStep - 1) / kStep * kStep;
  float *max = state.max() + first, *sum = state.sum() + first, *exact = state.exact_sum() + first;
  const bool with_residuals = L::kHasResiduals && residuals != nullptr;
  const bool plain = OnlyScales(args.span.scale, args.span.soft_cap, args.slopes != nullptr);
  const float unit = StateScale(args.span.scale, args.span.soft_cap, args.slopes != nullptr) * kLog2E;
  float top[kSoftmaxRows + W] = {}, base[kSoftmaxRows + W], before[kSoftmaxRows + W] = {}, factor[kSoftmaxRows + W];
  float heaviest[kSoftmaxRows];  // the largest sum of a base-2 score and the exponent of its value's unit
  for (int r = 0; r < count; ++r) {
    float* s = scores + r * args.stride;
    if (!plain) BendScores(args, first + r, padded, s);
    before[r] = max[r];
    if (!with_residuals) {
      top[r] = MaxOf(MaskScores(visible[r], padded, s, [](int, VF) {}));
    } else if constexpr (L::kHasResiduals) {
      VF largest = Splat(-kInfinity);
      top[r] = MaxOf(MaskScores(visible[r], padded, s, [&](int j, VF seen) {
        largest = Max(Fma(seen, Splat(unit), LoadFloats(residuals->value_exponents + j)), largest);
      }));
      heaviest[r] = MaxOf(largest);
    }
  }
  for (int r = 0; r < count; r += W) {
    const VF old = LoadFloats(before + r);
    const VF largest = Max(LoadFloats(top + r), old);
    const VF empty = Splat(-kInfinity);
    // While all scores so far are -inf, weights are 0, not exp(-inf - -inf).
    StoreFloats(base + r, largest == empty ? VF{} : largest);
    StoreFloats(factor + r, largest == old ? Splat(1.0f) : (old == empty ? VF{} : Exp2((old - largest) * unit)));
    StoreFloats(top + r, largest);
  }
  for (int r = 0; r < count; ++r) {
    float* row = scores + r * args.stride;
    float total = 0.0f, unrounded = 0.0f;
    if (args.value_scales != nullptr) {
      total = unrounded = WeighScaled(L{}, args.value_scales, visible[r], padded, Splat(base[r]), Splat(unit), row);
    } else if (!with_residuals) {
      total = Weigh(L{}, padded, Splat(base[r]), Splat(unit), row, &unrounded);
    } else if constexpr (L::kHasResiduals) {
      ScaleResiduals(residuals, r, heaviest[r], base[r] * unit);
      total = unrounded = WeighWithResiduals(L{}, residuals, r, padded, Splat(base[r]), Splat(unit), row);
    }
    max[r] = top[r];
    sum[r] = sum[r] * factor[r] + total;
    exact[r] = exact[r] * factor[r] + unrounded;
    correction[r] = factor[r];
  }
}

// Turns dot products with stored elements of quantized keys into scores.
KVPAGE_INLINE void ScaleScores(const float* scales, int size, float* scores) {
  for (int j = 0; j < size; j += W) StoreFloats(scores + j, LoadFloats(scores + j) * LoadFloats(scales + j));
}

// Whether 0 times any value of the tile is 0, so that a row may multiply values that it does not see by a weight of 0.
template <class T>
KVPAGE_INLINE bool AllFinite(const char* const* rows, std::int64_t offset, int size, int head_dim) {
  VF bad = {};
  for (int i = 0; i < size; ++i) {
    for (int d = 0; d < head_dim; d += W) bad = Fma(LoadAs(T{}, rows[i] + offset + d * T::kSize), VF{}, bad);
  }
  const float sum = SumOf(bad);
  return sum == 0.0f;
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_SOFTMAX_INL_H_
