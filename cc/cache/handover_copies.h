// Copies and zeroes blocks for hand-over, in host and in device memory.
#ifndef KVPAGE_CACHE_HANDOVER_COPIES_H_
#define KVPAGE_CACHE_HANDOVER_COPIES_H_

#include <cstdint>
#include <vector>

#include "cache/handover.h"
#include "cache/parts.h"

namespace kvpage::handover {

// Copies the blocks of a pinned slot into a new file with the header in `handover`, and seals it.
Status CopyToFile(const PoolParts& pool, std::int32_t slot, Handover* handover);
// The same for device memory: copies each block into an allocation that the pool does not keep.
Status CopyToHandles(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, Handover* handover);
// Zeroes a slot's last block after its tokens. No program may be using the slot.
Status ZeroBehind(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, std::int64_t tokens);
// Copies the last block of a received sequence into blocks of the pool, [ranges].
Status CopyLast(const PoolParts& pool, const MappingLock& mapping, const Handover& handover,
                const std::vector<std::int32_t>& blocks);

}  // namespace kvpage::handover

#endif  // KVPAGE_CACHE_HANDOVER_COPIES_H_
