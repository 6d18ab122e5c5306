// Dropping: a sequence whose attention has a sliding window gives up the blocks before the window.
//
// Positions and lengths do not change; the beginning of the slot becomes a hole. Afterwards, programs may read the slot
// only through windows that begin after the hole (program_ops.h). The sequence cannot be forked, truncated into the
// hole, or found by its tokens. Blocks that other slots or the prefix index also use are kept by these.
#ifndef KVPAGE_CACHE_DROPPING_H_
#define KVPAGE_CACHE_DROPPING_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::dropping {

// ---- host ----
// Declares that the slots no longer need the tokens before tokens[i]. All or nothing. (*dropped)[i] is the number of
// tokens, in full blocks, that the queued program is to drop; 0 if there are no more than were already dropped. The
// program unmaps the blocks. With a mirror, this call unmaps them, because all programs of the slots have run; it
// requires that `cache` is the newest value (its lengths are not used). Without a mirror the program checks that.
Status Start(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens,
             const CacheRef& cache, std::vector<std::int64_t>* dropped);
// Whether Start would drop any tokens of the slot.
Status Drops(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out);

// ---- programs ----
// Unmaps the blocks that the edits have dropped. Call this without locks, after the edits were made.
void Unmap(const PoolParts& pool, const EditList& list);

}  // namespace kvpage::dropping

#endif  // KVPAGE_CACHE_DROPPING_H_
