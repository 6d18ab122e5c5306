// Selects the kernels for a span on machines that can multiply bfloat16 pairs and bytes.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PATH_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PATH_INL_H_

#include <type_traits>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/avx512_bf16/pairs-inl.h"
#include "kernels/cpu/isa/avx512_bf16/quantized_decode-inl.h"
#include "kernels/cpu/isa/avx512_bf16/residuals-inl.h"  // IWYU pragma: keep: found by the type of lanes
#include "kernels/cpu/isa/avx512_bf16/target-inl.h"
#include "kernels/cpu/isa/decode-inl.h"
#include "kernels/cpu/isa/lanes-inl.h"
#include "kernels/cpu/isa/prefill-inl.h"
#include "kernels/cpu/isa/vector_types-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

struct Bf16Path {
  static constexpr bool PrefillsPairs(DType dtype, bool q_is_bf16, bool exact_weights, int head_dim) {
    // Residuals are implemented for bfloat16 values only. (Does not use IsQuantized(): the linker might keep the copy
    // compiled here.)
    const bool quantized = dtype == DType::kI8 || dtype == DType::kF8E4M3;
    return q_is_bf16 && head_dim % 2 == 0 && (dtype == DType::kBF16 || (quantized && !exact_weights));
  }

  template <class T>
  static void Decode(const SpanArgs& args) {
    const bool rounded = args.q_is_bf16 && !args.exact_weights;
    if constexpr (std::is_same_v<T, I8>) {
      rounded ? DecodeQuantizedSpan<2>(args) : DecodeQuantizedSpan<3>(args);
    } else if constexpr (std::is_same_v<T, F8E4M3>) {
      rounded ? DecodeQuantizedSpan<0>(args) : DecodeSpan<T, FloatLanes>(args);
    } else if constexpr (std::is_same_v<T, BF16>) {
      args.q_is_bf16 ? DecodeSpan<T, PairLanes>(args) : DecodeSpan<T, FloatLanes>(args);
    } else {
      DecodeSpan<T, FloatLanes>(args);
    }
  }

  template <class T>
  static void Prefill(const SpanArgs& args) {
    if constexpr (kExactInBF16<T>) {
      if (PrefillsPairs(args.dtype, args.q_is_bf16, args.exact_weights, args.tile.head_dim)) {
        return PrefillSpan<T, PairLanes>(args);
      }
    }
    PrefillSpan<T, FloatLanes>(args);
  }
};

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_BF16_PATH_INL_H_
