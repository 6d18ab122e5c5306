// Faults that programs recorded on a device, in the words that the same mistakes have on CPU.
#ifndef KVPAGE_DEVICE_FAULT_H_
#define KVPAGE_DEVICE_FAULT_H_

#include <cstdint>

#include "base/device_table.h"
#include "base/status.h"
#include "cache/geometry.h"

namespace kvpage {

// The status that a program would have failed with on CPU. `id` and `spec` are those of the pool whose record the fault
// stood in; a fault of kind kNoPool needs neither.
Status DescribeFault(const Fault& fault, std::int32_t id, const SpecInts& spec);

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_FAULT_H_
