// Vectors of KVPAGE_LANES floats as compiler vector extensions, and tags for the elements that are loaded into them.
#ifndef KVPAGE_KERNELS_CPU_ISA_VECTOR_TYPES_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_VECTOR_TYPES_INL_H_

#include <cstdint>

#include "kernels/cpu/isa/target-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

constexpr int W = KVPAGE_LANES;
typedef float VF __attribute__((vector_size(W * 4)));
typedef std::int32_t VI __attribute__((vector_size(W * 4)));
typedef std::uint16_t VH __attribute__((vector_size(W * 2)));
typedef std::int8_t VB __attribute__((vector_size(W)));

// Element tags: pointers into a cache are char*; a tag names the type stored there.
struct F32 {
  static constexpr int kSize = 4;
};
struct BF16 {
  static constexpr int kSize = 2;
};
struct F16 {
  static constexpr int kSize = 2;
};
struct I8 {
  static constexpr int kSize = 1;
};
struct F8E4M3 {
  static constexpr int kSize = 1;
};

KVPAGE_INLINE VF Splat(float x) { return x - VF{}; }
KVPAGE_INLINE VI SplatInt(std::int32_t x) { return x - VI{}; }

template <class V>
KVPAGE_INLINE V LoadBits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
KVPAGE_INLINE void StoreBits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
KVPAGE_INLINE VF LoadFloats(const float* p) { return LoadBits<VF>(p); }
KVPAGE_INLINE void StoreFloats(float* p, VF v) { StoreBits(p, v); }

KVPAGE_INLINE VI Iota() {
  VI v;
  KVPAGE_UNROLL for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_VECTOR_TYPES_INL_H_
