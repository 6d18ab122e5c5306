// A failed system call as a status that says what the system refused and what that means here.
#ifndef KVPAGE_VMM_SYSTEM_ERROR_H_
#define KVPAGE_VMM_SYSTEM_ERROR_H_

#include <cstdint>

#include "base/status.h"

namespace kvpage {

// `call` failed with the errno `error`; `bytes`: of how many bytes it was, -1 where it had no size. ResourceExhausted
// only where memory was short, so that no caller advises to free some where the call is forbidden.
Status SystemError(const char* call, std::int64_t bytes, int error);

}  // namespace kvpage

#endif  // KVPAGE_VMM_SYSTEM_ERROR_H_
