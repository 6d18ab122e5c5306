// Driver: the CUDA driver as a table of function pointers that is opened at run time, so that one build works with and
// without a driver; tests use a fake one instead (cc/testing).
#ifndef KVPAGE_VMM_DRIVER_H_
#define KVPAGE_VMM_DRIVER_H_

#include <cstdint>
#include <string>

#include "base/status.h"
#include "vmm/cuda_abi.h"

namespace kvpage {

namespace cu {

// Identifies an entry point in messages, counts and injected faults.
enum class Call : std::int32_t {
#define KVPAGE_ENUMERATE(name, symbol, args) k##name,
  KVPAGE_DRIVER_CALLS(KVPAGE_ENUMERATE)
#undef KVPAGE_ENUMERATE
      kCount
};

const char* Symbol(Call call);

}  // namespace cu

struct Driver {
#define KVPAGE_DECLARE(name, symbol, args) cu::Result(*name) args = nullptr;
  // Argument types are named as in namespace cu.
  using Access = cu::Access;
  using AccessDesc = cu::AccessDesc;
  using CaptureMode = cu::CaptureMode;
  using CaptureStatus = cu::CaptureStatus;
  using AllocationProp = cu::AllocationProp;
  using Attribute = cu::Attribute;
  using Context = cu::Context;
  using Device = cu::Device;
  using DevicePtr = cu::DevicePtr;
  using Event = cu::Event;
  using Granularity = cu::Granularity;
  using HandleType = cu::HandleType;
  using MemHandle = cu::MemHandle;
  using Result = cu::Result;
  using Stream = cu::Stream;
  using Uuid = cu::Uuid;
  KVPAGE_DRIVER_CALLS(KVPAGE_DECLARE)
#undef KVPAGE_DECLARE

  // The system's driver, opened and initialised by the first call and never closed. If there is none, returns a status
  // with the library that was not found and what to do.
  static Status Open(const Driver** out);

  // The status of a failed call: the symbol, its operands and the driver's error code. `what` continues the sentence
  // after the symbol: "of 2097152 bytes". Out of memory becomes RESOURCE_EXHAUSTED and mentions JAX's share of the GPU.
  Status Explain(cu::Result result, cu::Call call, const std::string& what) const;
};

// Calls an entry point and returns from the function if it fails; `what` is evaluated only then:
//   KVPAGE_CU(driver, MemFree, "of the table", address);
#define KVPAGE_CU(driver, name, what, ...)                                                                            \
  do {                                                                                                                \
    if (const ::kvpage::cu::Result _result = (driver).name(__VA_ARGS__); _result != ::kvpage::cu::Result::kSuccess) { \
      return (driver).Explain(_result, ::kvpage::cu::Call::k##name, (what));                                          \
    }                                                                                                                 \
  } while (false)

// For tests: opens `library` instead of libcuda.so.1, without effect on Open.
Status OpenDriverLibrary(const std::string& library, Driver* out);

}  // namespace kvpage

#endif  // KVPAGE_VMM_DRIVER_H_
