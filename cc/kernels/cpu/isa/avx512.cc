// Compiles the kernels for AVX-512 F, BW, VL and DQ.
#include "kernels/cpu/isa.h"

#if defined(__AVX512F__)
#define KVPAGE_ISA avx512
#define KVPAGE_LANES 16
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu {
const Kernels* Avx512Kernels() { return &avx512::kTable<avx512::GenericPath>; }
}  // namespace kvpage::cpu
#else
namespace kvpage::cpu {
const Kernels* Avx512Kernels() { return nullptr; }
}  // namespace kvpage::cpu
#endif
