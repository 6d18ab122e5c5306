// Turns a failed system call into a status that says what the system refused and what this means here.
#ifndef KVPAGE_VMM_SYSTEM_ERROR_H_
#define KVPAGE_VMM_SYSTEM_ERROR_H_

#include <cstdint>

#include "base/status.h"

namespace kvpage {

// For `call`, which failed with the errno `error`; `bytes` is its size, or -1 if it has none. ResourceExhausted only if
// memory was short, so that no caller recommends freeing memory when the call is forbidden.
Status SystemError(const char* call, std::int64_t bytes, int error);

}  // namespace kvpage

#endif  // KVPAGE_VMM_SYSTEM_ERROR_H_
