// Vectors: the primitives of the selected instruction set, and functions built from them.
#ifndef KVPAGE_KERNELS_CPU_ISA_VECTOR_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_VECTOR_INL_H_

#include <cstdint>

#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector_types-inl.h"  // IWYU pragma: export

// The only place where a generic file selects code by instruction set.
#if KVPAGE_LANES == 16
#include "kernels/cpu/isa/avx512/vector-inl.h"  // IWYU pragma: export
#elif KVPAGE_LANES == 8
#include "kernels/cpu/isa/avx2/vector-inl.h"  // IWYU pragma: export
#else
#include "kernels/cpu/isa/baseline/vector-inl.h"  // IWYU pragma: export
#endif

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Elementwise maximum of `top` and the float bits without their sign. These are ordered like the magnitudes of the
// floats, with infinity and NaN on top.
KVPAGE_INLINE VI MaxMagnitude(VI top, VI bits) {
  const VI magnitude = bits & INT32_MAX;
  return magnitude > top ? magnitude : top;
}

// Transposes the square of 32-bit lanes with log2(W) rounds of the perfect shuffle.
KVPAGE_INLINE void Transpose(VF (&r)[W]) {
  VF t[W];
  KVPAGE_UNROLL for (int n = 1; n < W; n *= 2) {
    KVPAGE_UNROLL for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = ZipLow(r[i], r[i + W / 2]);
      t[2 * i + 1] = ZipHigh(r[i], r[i + W / 2]);
    }
    KVPAGE_UNROLL for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// LoadAs(tag, p) loads W elements as floats, StoreAs(tag, p, v) stores W floats as elements, rounding to nearest even.

KVPAGE_INLINE VF LoadAs(F32, const void* p) { return LoadBits<VF>(p); }
KVPAGE_INLINE VF LoadAs(BF16, const void* p) { return (VF)(Widen(LoadBits<VH>(p)) << 16); }

// Loads 2 W bfloat16 as two vectors, the even and the odd elements: half the instructions of two loads in order.
KVPAGE_INLINE void LoadEvenOdd(const void* p, VF* even, VF* odd) {
  const VI bits = LoadBits<VI>(p);
  *even = (VF)(bits << 16);
  *odd = (VF)(bits & static_cast<std::int32_t>(0xffff0000u));
}

KVPAGE_INLINE void StoreAs(F32, void* p, VF v) { StoreBits(p, v); }

// The upper 16 bits of the result are v rounded to bfloat16, to nearest even. Not for NaN.
KVPAGE_INLINE VI RoundToUpperHalf(VF v) { return (VI)v + 0x7fff + (((VI)v >> 16) & 1); }

KVPAGE_INLINE void StoreAs(BF16, void* p, VF v) {
  const VI rounded = RoundToUpperHalf(v) >> 16;
  const VI quiet = ((VI)v >> 16) | 0x40;
  StoreBits(p, __builtin_convertvector((v == v ? rounded : quiet) & 0xffff, VH));
}

// Loads W elements at p, or the n < W that remain of a row, followed by zeros. Does not access memory past them, which
// may not be mapped.
template <class T>
KVPAGE_INLINE VF LoadFirst(const char* p, std::int64_t n) {
  if (n >= W) return LoadAs(T{}, p);
  if (n <= 0) return VF{};
  char padded[W * T::kSize] = {};
  __builtin_memcpy(padded, p, n * T::kSize);
  return LoadAs(T{}, padded);
}

// Stores the first n < W floats of v at the end of a row.
template <class T>
KVPAGE_INLINE void StoreFirst(char* p, std::int64_t n, VF v) {
  char padded[W * T::kSize];
  StoreAs(T{}, padded, v);
  __builtin_memcpy(p, padded, n * T::kSize);
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_VECTOR_INL_H_
