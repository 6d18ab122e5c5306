// Converts elements between float32, bfloat16 and float16.
#ifndef KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

// Calls f with the tag of a dtype, which must not be quantized.
template <class F>
KVPAGE_INLINE void WithFloatTag(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(F32{});
    case DType::kBF16:
      return f(BF16{});
    case DType::kF16:
      return f(F16{});
    case DType::kI8:
    case DType::kF8E4M3:
      return;
  }
}

template <class D, class S>
void ConvertAs(char* dst, const char* src, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) StoreAs(D{}, dst + i * D::kSize, LoadAs(S{}, src + i * S::kSize));
  if (i < n) StoreFirst<D>(dst + i * D::kSize, n - i, LoadFirst<S>(src + i * S::kSize, n - i));
}

void Convert(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (dst_dtype == src_dtype) {
    __builtin_memcpy(to, from, n * (dst_dtype == DType::kF32 ? 4 : 2));
    return;
  }
  WithFloatTag(dst_dtype, [&](auto d) {
    WithFloatTag(src_dtype, [&](auto s) { ConvertAs<decltype(d), decltype(s)>(to, from, n); });
  });
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_
