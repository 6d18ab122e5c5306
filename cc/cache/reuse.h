// Reuse of segments: copies the keys and values of tokens that one sequence has computed to the end of another, at
// other positions (copy_rotated).
//
// The result is approximate, because the tokens have seen a different context. So the prefix index must not contain
// them: HostSlot::exact limits what it may store of the target, starting before the program is queued.
#ifndef KVPAGE_CACHE_REUSE_H_
#define KVPAGE_CACHE_REUSE_H_

#include <cstdint>
#include <vector>

#include "base/segment_copies.h"
#include "cache/parts.h"

namespace kvpage::reuse {

// The value of HostSlot::exact before a call changed it.
struct Mark {
  std::int32_t slot = 0;
  std::int64_t exact = 0;
};

// ---- host ----
// Checks the copies, whose source tokens must be committed, and limits what the prefix index may store of the targets.
// Sets `committed` of each copy. All or nothing; pass `before` to Undo.
Status Start(const PoolParts& pool, std::vector<SegmentCopy>* copies, std::vector<Mark>* before);
// Called if the program was not queued.
void Undo(const PoolParts& pool, const std::vector<Mark>& before);

// ---- programs ----
// Checks the copies and extends the targets, all or none. Pins both slots of each copy for the caller, who copies to
// position to[i]; the targets count as written when `pinned` ends.
Status CopyRotated(const PoolParts& pool, const char* op, const CacheRef& cache, const SegmentList& list,
                   PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths, std::vector<std::int32_t>* to);

}  // namespace kvpage::reuse

#endif  // KVPAGE_CACHE_REUSE_H_
