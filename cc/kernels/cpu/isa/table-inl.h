// The table of kernels for one instruction set; its translation unit returns it.
#ifndef KVPAGE_KERNELS_CPU_ISA_TABLE_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_TABLE_INL_H_

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/convert-inl.h"
#include "kernels/cpu/isa/entry-inl.h"
#include "kernels/cpu/isa/quantize-inl.h"
#include "kernels/cpu/isa/target-inl.h"

namespace kvpage::cpu::KVPAGE_ISA {
namespace {

#define KVPAGE_STRINGIZE_(x) #x
#define KVPAGE_STRINGIZE(x) KVPAGE_STRINGIZE_(x)

// Path selects the kernels for a span: GenericPath or the set's own.
template <class Path>
constexpr Kernels kTable = {
    KVPAGE_STRINGIZE(KVPAGE_ISA), Load<Path>, Attend<Path>, Merge, Finish, Convert, Quantize, Dequantize};

}  // namespace
}  // namespace kvpage::cpu::KVPAGE_ISA

#endif  // KVPAGE_KERNELS_CPU_ISA_TABLE_INL_H_
