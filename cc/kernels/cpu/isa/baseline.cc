// Compiles the portable kernels: four lanes, with the compiler's default target.
#include "kernels/cpu/isa.h"

#define KVPAGE_ISA baseline
#define KVPAGE_LANES 4
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu {
const Kernels* BaselineKernels() { return &baseline::kTable<baseline::GenericPath>; }
}  // namespace kvpage::cpu
