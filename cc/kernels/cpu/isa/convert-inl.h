// Elements converted between float32, bfloat16 and float16.
#ifndef KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/target-inl.h"
#include "kernels/cpu/isa/vector-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

template <class D, class S>
void ConvertAs(char* dst, const char* src, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) StoreAs(D{}, dst + i * D::kSize, LoadAs(S{}, src + i * S::kSize));
  if (i < n) StoreFirst<D>(dst + i * D::kSize, n - i, LoadFirst<S>(src + i * S::kSize, n - i));
}

template <class D>
void ConvertTo(char* dst, const char* src, DType src_dtype, std::int64_t n) {
  switch (src_dtype) {
    case DType::kF32:
      return ConvertAs<D, F32>(dst, src, n);
    case DType::kBF16:
      return ConvertAs<D, BF16>(dst, src, n);
    case DType::kF16:
      return ConvertAs<D, F16>(dst, src, n);
    case DType::kI8:
    case DType::kF8E4M3:
      return;
  }
}

void Convert(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (dst_dtype == src_dtype) {
    __builtin_memcpy(to, from, n * (dst_dtype == DType::kF32 ? 4 : 2));
    return;
  }
  switch (dst_dtype) {
    case DType::kF32:
      return ConvertTo<F32>(to, from, src_dtype, n);
    case DType::kBF16:
      return ConvertTo<BF16>(to, from, src_dtype, n);
    case DType::kF16:
      return ConvertTo<F16>(to, from, src_dtype, n);
    case DType::kI8:
    case DType::kF8E4M3:
      return;
  }
}

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_CONVERT_INL_H_
