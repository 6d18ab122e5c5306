// Describes faults that programs recorded on a device, with the same messages that these errors have on CPU.
#ifndef KVPAGE_DEVICE_FAULT_H_
#define KVPAGE_DEVICE_FAULT_H_

#include <cstdint>

#include "base/device_table.h"
#include "base/status.h"
#include "cache/geometry.h"

namespace kvpage {

// The status that the program would have returned on CPU. `id` and `spec` are those of the pool that recorded the
// fault; they are not used for a fault of kind kNoPool.
Status DescribeFault(const Fault& fault, std::int32_t id, const SpecInts& spec);

}  // namespace kvpage

#endif  // KVPAGE_DEVICE_FAULT_H_
