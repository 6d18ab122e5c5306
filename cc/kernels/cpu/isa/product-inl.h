// Matrix products of prefill. The right operand is packed into panels of kPanel columns, row after row, so that the
// product reads one stream. The left operand is read in place, one 32-bit lane at a time.
#ifndef KVPAGE_KERNELS_CPU_ISA_PRODUCT_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_PRODUCT_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

constexpr int kPanel = 2 * W;
// This many rows of 2 vectors are accumulated at a time: enough chains to hide the latency of the fused multiply-add,
// with one load per two of them or so. The remaining registers hold the operands.
constexpr int kProductRows = W == 16 ? 12 : 6;
static_assert(kRowBlock % kProductRows == 0);

// c[R, kPanel] = c * correction + a[R, n] * b[n, kPanel]; c counts as 0 if `correction` is null. a_stride is in lanes.
template <class L, int R>
KVPAGE_NOINLINE void Product(const float* a, std::int64_t a_stride, const float* b, int n, const float* correction,
                             float* c, int c_stride) {
  VF sum[R][2];
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = VF{};
  // One pointer per three rows: addressing adds a stride once or twice for free, and there are no registers for R
  // pointers.
  constexpr int kPointers = (R + 2) / 3;
  const float* rows[kPointers];
  KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * a_stride;
  for (int k = 0; k < n; ++k) {
    const VI x0 = LoadBits<VI>(b), x1 = LoadBits<VI>(b + W);
    b += kPanel;
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      const VI y = SplatInt(LoadBits<std::int32_t>(rows[r / 3] + r % 3 * a_stride));
      sum[r][0] = L::MulAdd(sum[r][0], x0, y);
      sum[r][1] = L::MulAdd(sum[r][1], x1, y);
    }
    KVPAGE_UNROLL for (int i = 0; i < kPointers; ++i)++ rows[i];
  }
  if (correction != nullptr) {
    KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
      sum[r][0] = Fma(LoadFloats(c + r * c_stride), Splat(correction[r]), sum[r][0]);
      sum[r][1] = Fma(LoadFloats(c + r * c_stride + W), Splat(correction[r]), sum[r][1]);
    }
  }
  KVPAGE_UNROLL for (int r = 0; r < R; ++r) {
    StoreFloats(c + r * c_stride, sum[r][0]);
    StoreFloats(c + r * c_stride + W, sum[r][1]);
  }
}

// The same for a block of kRowBlock rows.
template <class L>
KVPAGE_INLINE void BlockProduct(const float* a, std::int64_t a_stride, const float* b, int n, const float* correction,
                                float* c, int c_stride) {
  KVPAGE_UNROLL for (int r = 0; r < kRowBlock; r += kProductRows) {
    Product<L, kProductRows>(a + r * a_stride, a_stride, b, n, correction == nullptr ? nullptr : correction + r,
                             c + r * c_stride, c_stride);
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_PRODUCT_INL_H_
