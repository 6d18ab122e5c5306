// edit_slots: the single op that host calls (acquire, release, ...) queue.
#ifndef KVPAGE_CACHE_EDIT_OPS_H_
#define KVPAGE_CACHE_EDIT_OPS_H_

#include <cstdint>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::edit_ops {

// Makes all edits or none. Pins the slots of the copies for the caller, who makes the copies; their targets count as
// written when `pinned` ends.
Status EditSlots(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list,
                 PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths);

}  // namespace kvpage::edit_ops

#endif  // KVPAGE_CACHE_EDIT_OPS_H_
