// Keeps some memory free for the rest of the system.
#ifndef KVPAGE_VMM_HEADROOM_H_
#define KVPAGE_VMM_HEADROOM_H_

#include <cstdint>

#include "base/status.h"

namespace kvpage {

// Checks that `bytes` can be allocated now without triggering the OOM killer. Reads a few files in /proc and /sys (tens
// of microseconds).
Status CheckHeadroom(std::int64_t bytes);

}  // namespace kvpage

#endif  // KVPAGE_VMM_HEADROOM_H_
