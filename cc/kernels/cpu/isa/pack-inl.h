// Packs a tile of keys and values into the panels that the products of prefill read.
#ifndef KVPAGE_KERNELS_CPU_ISA_PACK_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_PACK_INL_H_

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/product-inl.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Keys become columns: dst[kPrefillTokens / kPanel][lanes, kPanel], with the number of lanes rounded up. Columns past
// `size` in the last panel are zero.
template <class T>
void PackKeys(const char* const* rows, int size, int lanes, std::int64_t panel_floats, float* dst) {
  for (int k = 0; k < size || k % kPanel != 0; k += W) {
    float* panel = dst + k / kPanel * panel_floats + k % kPanel;
    for (int d = 0; d < lanes; d += W) {
      VF square[W];
      KVPAGE_UNROLL for (int i = 0; i < W; ++i) {
        square[i] = k + i < size ? LoadFirst<T>(rows[k + i] + d * T::kSize, lanes - d) : VF{};
      }
      Transpose(square);
      KVPAGE_UNROLL for (int i = 0; i < W; ++i) StoreFloats(panel + (d + i) * kPanel, square[i]);
    }
  }
}

// Values keep their order: dst[padded_dim / kPanel][kPrefillTokens, kPanel], in the lanes of L.
template <class T>
void PackValues(FloatLanes, const char* const* rows, std::int64_t offset, int size, int head_dim, float* dst) {
  const int padded_dim = PaddedDim(head_dim);
  for (int k = 0; k < size; ++k) {
    const char* row = rows[k] + offset;
    for (int d = 0; d < padded_dim; d += kPanel) {
      float* to = dst + d * kPrefillTokens + k * kPanel;
      StoreFloats(to, LoadFirst<T>(row + d * T::kSize, head_dim - d));
      StoreFloats(to + W, LoadFirst<T>(row + (d + W) * T::kSize, head_dim - d - W));
    }
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_PACK_INL_H_
