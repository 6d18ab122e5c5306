// Compiles the kernels for AVX-512 with dot products of bfloat16 and of bytes, and with byte permutations: Zen 4,
// Sapphire Rapids and later. (Cooper Lake lacks the byte permutations and uses plain AVX-512.)
#include "kernels/cpu/isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define KVPAGE_ISA avx512_bf16
#define KVPAGE_LANES 16
#include "kernels/cpu/isa/avx512_bf16/path-inl.h"
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu::avx512_bf16 {
const Kernels* Table() { return &kTable<Bf16Path>; }
}  // namespace kvpage::cpu::avx512_bf16
#else
namespace kvpage::cpu::avx512_bf16 {
const Kernels* Table() { return nullptr; }
}  // namespace kvpage::cpu::avx512_bf16
#endif
