// Errors with which all devices of a mesh must fail together.
//
// Where an op is followed by a collective, a device that failed would leave the others waiting for it, and XLA ends the
// process after a while. So such ops put a number for their error into a result, the devices agree on one of the
// numbers, and then all of them fail with its error ("raise_fault").
#ifndef KVPAGE_FFI_CPU_SHARD_FAULTS_H_
#define KVPAGE_FFI_CPU_SHARD_FAULTS_H_

#include <cstdint>

#include "ffi/decode.h"

namespace kvpage {

// Stores an error and returns its number, which is positive; 0 for success. The latest 256 errors are kept.
std::int32_t NoteFault(const ffi::Error& error);

// The error with this number; success for 0.
ffi::Error FaultOf(std::int32_t number);

// The handler has run and its error, if any, is in *fault.
inline ffi::Error Deferred(const ffi::Error& error, ffi::Result<S32>& fault) {
  fault->typed_data()[0] = NoteFault(error);
  return ffi::Error::Success();
}

}  // namespace kvpage

#endif  // KVPAGE_FFI_CPU_SHARD_FAULTS_H_
