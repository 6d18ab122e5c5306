// Compiles the kernels for AVX-512 with BF16 dot products.
#include "kernels/cpu/isa.h"

#if defined(__AVX512BF16__)
#define KVPAGE_ISA avx512_bf16
#define KVPAGE_LANES 16
#define KVPAGE_BF16_DOT 1
#include "kernels/cpu/isa_body.inc"

namespace kvpage::cpu {
const Kernels* Avx512Bf16Kernels() { return &avx512_bf16::kTable; }
}  // namespace kvpage::cpu
#else
namespace kvpage::cpu {
const Kernels* Avx512Bf16Kernels() { return nullptr; }
}  // namespace kvpage::cpu
#endif
