// Everything that is compiled for one instruction set. The including file defines KVPAGE_ISA (a namespace),
// KVPAGE_LANES (float32 lanes of a vector) and perhaps KVPAGE_BF16_DOT and KVPAGE_BYTE_DOT. The anonymous namespace
// keeps every template instantiation out of other files' reach.
#include <cstdint>

// GCC 12's own AVX-512 intrinsics trip these where they are inlined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef KVPAGE_BF16_DOT
#define KVPAGE_BF16_DOT 0
#endif

#ifndef KVPAGE_BYTE_DOT
#define KVPAGE_BYTE_DOT 0
#endif

#define KVPAGE_INLINE inline __attribute__((always_inline))
// For the inner loops: by themselves they keep their accumulators in registers, inlined into their callers GCC spills.
#define KVPAGE_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define KVPAGE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVPAGE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

#define KVPAGE_STRINGIZE_(x) #x
#define KVPAGE_STRINGIZE(x) KVPAGE_STRINGIZE_(x)

#include "kernels/cpu/isa/vector-inl.h"
//
#include "kernels/cpu/isa/math-inl.h"
//
#include "kernels/cpu/isa/product-inl.h"
//
#include "kernels/cpu/isa/avx512_bf16/bytes-inl.h"
//
#include "kernels/cpu/isa/avx512_bf16/residuals-inl.h"
//
#include "kernels/cpu/isa/softmax-inl.h"
//
#include "kernels/cpu/isa/decode-inl.h"
//
#include "kernels/cpu/isa/avx512_bf16/quantized_operands-inl.h"
//
#include "kernels/cpu/isa/avx512_bf16/quantized_decode-inl.h"
//
#include "kernels/cpu/isa/prefill-inl.h"
//
#include "kernels/cpu/isa/entry-inl.h"
//
#include "kernels/cpu/isa/quantize-inl.h"

constexpr Kernels kTable = {KVPAGE_STRINGIZE(KVPAGE_ISA), Load, Attend, Merge, Finish, Convert, Quantize, Dequantize};

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA
