// The 32-bit lanes of a product. Kernels that take a type L multiply float32 lanes where L is FloatLanes. A set that
// can multiply other lanes adds a type with the same members and overloads that take it: PackValues, Weigh, WeighScaled
// (see avx512_bf16/pairs-inl.h).
#ifndef KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_

#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Stands for the residuals of rounded weights where nothing is rounded.
struct NoResiduals {};

struct FloatLanes {
  static constexpr int kElements = 1;  // of a lane
  // Whether weights that are rounded to these lanes can have residuals, and their types (see Softmax).
  static constexpr bool kHasResiduals = false;
  using TileResiduals = NoResiduals;
  using BlockResiduals = NoResiduals;
  // The tag of a lane of stored elements.
  template <class T>
  using Stored = T;

  template <class T>
  static KVPAGE_INLINE VI Load(const void* p) {
    return (VI)LoadAs(T{}, p);
  }
  static KVPAGE_INLINE VF MulAdd(VF sum, VI x, VI y) { return Fma((VF)x, (VF)y, sum); }
  // 0 where it is finite, NaN where not.
  static KVPAGE_INLINE VF Check(VI x) { return (VF)x * 0.0f; }
};

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_
