// Compiles the portable kernels: four lanes, whatever the compiler targets by default.
#include "kernels/cpu/isa.h"

#define KVPAGE_ISA baseline
#define KVPAGE_LANES 4
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu {
const Kernels* BaselineKernels() { return &baseline::kTable<baseline::GenericPath>; }
}  // namespace kvpage::cpu
