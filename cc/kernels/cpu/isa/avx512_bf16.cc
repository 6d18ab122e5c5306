// Compiles the kernels for AVX-512 with dot products of bfloat16 and of bytes and with lookups of bytes: all of Zen 4,
// Sapphire Rapids and later ones. (Cooper Lake has no such lookups and takes plain AVX-512.)
#include "kernels/cpu/isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define KVPAGE_ISA avx512_bf16
#define KVPAGE_LANES 16
#include "kernels/cpu/isa/avx512_bf16/path-inl.h"
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu {
const Kernels* Avx512Bf16Kernels() { return &avx512_bf16::kTable<avx512_bf16::Bf16Path>; }
}  // namespace kvpage::cpu
#else
namespace kvpage::cpu {
const Kernels* Avx512Bf16Kernels() { return nullptr; }
}  // namespace kvpage::cpu
#endif
