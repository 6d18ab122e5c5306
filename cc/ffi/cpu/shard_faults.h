// Errors with which all devices of a mesh must fail together.
//
// If an op is followed by a collective and fails on one device, the others wait for this device, and XLA ends the
// process after a while. So such ops return the number of their error as a result, the devices agree on one of these
// numbers, and then all of them fail with its error ("raise_fault").
#ifndef KVPAGE_FFI_CPU_SHARD_FAULTS_H_
#define KVPAGE_FFI_CPU_SHARD_FAULTS_H_

#include <cstdint>

#include "ffi/decode.h"

namespace kvpage {

// Stores an error and returns its number, which is positive, or 0 for success. The latest 256 errors are kept.
std::int32_t NoteFault(const ffi::Error& error);

// The error with this number; success if it is 0.
ffi::Error FaultOf(std::int32_t number);

// Stores a handler's error, if any, in *fault instead of returning it.
inline ffi::Error Deferred(const ffi::Error& error, ffi::Result<S32>& fault) {
  fault->typed_data()[0] = NoteFault(error);
  return ffi::Error::Success();
}

}  // namespace kvpage

#endif  // KVPAGE_FFI_CPU_SHARD_FAULTS_H_
