// Compiles the kernels for AVX2, FMA and F16C.
#include "kernels/cpu/isa.h"

#if defined(__AVX2__)
#define KVPAGE_ISA avx2
#define KVPAGE_LANES 8
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu {
const Kernels* Avx2Kernels() { return &avx2::kTable<avx2::GenericPath>; }
}  // namespace kvpage::cpu
#else
namespace kvpage::cpu {
const Kernels* Avx2Kernels() { return nullptr; }
}  // namespace kvpage::cpu
#endif
