// Compiles the portable kernels: four lanes, with the compiler's default target.
#include "kernels/cpu/isa.h"

#define KVPAGE_ISA baseline
#define KVPAGE_LANES 4
#include "kernels/cpu/isa/table-inl.h"

namespace kvpage::cpu::baseline {
const Kernels* Table() { return &kTable<GenericPath>; }
}  // namespace kvpage::cpu::baseline
