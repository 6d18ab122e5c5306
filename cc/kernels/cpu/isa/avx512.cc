// Compiles the kernels for AVX-512 F, BW, VL and DQ.
#include "kernels/cpu/isa.h"

#if defined(__AVX512F__)
#define KVPAGE_ISA avx512
#define KVPAGE_LANES 16
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu::avx512 {
const Kernels* Table() { return &kTable<GenericPath>; }
}  // namespace kvpage::cpu::avx512
#else
namespace kvpage::cpu::avx512 {
const Kernels* Table() { return nullptr; }
}  // namespace kvpage::cpu::avx512
#endif
