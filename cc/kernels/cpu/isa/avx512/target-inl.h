// isa/target-inl.h for the files of this folder: selects their instruction set if one of them is opened alone.
#ifndef KVPAGE_KERNELS_CPU_ISA_AVX512_TARGET_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_AVX512_TARGET_INL_H_

#ifndef KVPAGE_ISA
#define KVPAGE_ISA avx512
#define KVPAGE_LANES 16
#endif
#include "kernels/cpu/isa/target-inl.h"  // IWYU pragma: export

#endif  // KVPAGE_KERNELS_CPU_ISA_AVX512_TARGET_INL_H_
