// Compiles the kernels for AVX2, FMA and F16C.
#include "kernels/cpu/isa.h"

#if defined(__AVX2__)
#define KVPAGE_ISA avx2
#define KVPAGE_LANES 8
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu::avx2 {
const Kernels* Table() { return &kTable<GenericPath>; }
}  // namespace kvpage::cpu::avx2
#else
namespace kvpage::cpu::avx2 {
const Kernels* Table() { return nullptr; }
}  // namespace kvpage::cpu::avx2
#endif
