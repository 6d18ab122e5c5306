// Reuse of segments: the keys and values of tokens that one sequence has computed are copied to the end of another, at
// other positions (copy_rotated).
//
// The result is approximate, because the tokens have seen another context. So the prefix index must not learn of them:
// HostSlot::exact bounds what it may have of the target, from before the program is queued.
#ifndef KVPAGE_CACHE_REUSE_H_
#define KVPAGE_CACHE_REUSE_H_

#include <cstdint>
#include <vector>

#include "base/segment_copies.h"
#include "cache/parts.h"

namespace kvpage::reuse {

// HostSlot::exact of a slot before a call changed it.
struct Mark {
  std::int32_t slot = 0;
  std::int64_t exact = 0;
};

// ---- host ----
// Checks the copies, of committed tokens of their sources, and bounds what the prefix index may have of the targets.
// Sets `committed` of each copy. All or nothing; `before` is what Undo takes.
Status Start(const PoolParts& pool, std::vector<SegmentCopy>* copies, std::vector<Mark>* before);
// The program was not queued.
void Undo(const PoolParts& pool, const std::vector<Mark>& before);

// ---- programs ----
// Checks the copies and makes the targets longer, all or none. Both slots of each copy are pinned for the caller to
// copy to position to[i] on, and the targets count as written when `pinned` ends.
Status CopyRotated(const PoolParts& pool, const char* op, const CacheRef& cache, const SegmentList& list,
                   PinnedSlots* pinned, std::uint32_t* epoch, std::int32_t* lengths, std::vector<std::int32_t>* to);

}  // namespace kvpage::reuse

#endif  // KVPAGE_CACHE_REUSE_H_
