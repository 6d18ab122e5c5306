// The 32-bit lanes of a product. Kernels with a type parameter L multiply float32 lanes if L is FloatLanes. A set that
// can multiply other lanes adds a type with the same members and the overloads PackValues, Weigh and WeighScaled for it
// (see avx512_bf16/pairs-inl.h).
#ifndef KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_

#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Placeholder for residuals if weights are not rounded.
struct NoResiduals {};

struct FloatLanes {
  static constexpr int kElements = 1;  // elements per lane
  // Whether weights that are rounded to these lanes can have residuals, and the types of these (see Softmax).
  static constexpr bool kHasResiduals = false;
  using TileResiduals = NoResiduals;
  using BlockResiduals = NoResiduals;
  // The tag of the elements stored in a lane.
  template <class T>
  using Stored = T;

  template <class T>
  static KVPAGE_INLINE VI Load(const void* p) {
    return (VI)LoadAs(T{}, p);
  }
  static KVPAGE_INLINE VF MulAdd(VF sum, VI x, VI y) { return Fma((VF)x, (VF)y, sum); }
  // 0 if x is finite, NaN if not.
  static KVPAGE_INLINE VF Check(VI x) { return (VF)x * 0.0f; }
};

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_LANES_INL_H_
