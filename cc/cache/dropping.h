// Dropping: a sequence whose attention has a sliding window gives up the blocks that the window has left behind.
//
// Positions and lengths do not change; the beginning of the slot becomes a hole. From then on programs may read the
// slot only through windows that begin behind it (program_ops.h), and it can neither be forked, nor be made shorter
// than the hole, nor be found by its tokens. Blocks that others share, or that the prefix index refers to, stay with
// those.
#ifndef KVPAGE_CACHE_DROPPING_H_
#define KVPAGE_CACHE_DROPPING_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::dropping {

// ---- host ----
// The slots no longer need what lies before tokens[i]. All or nothing. (*dropped)[i]: the tokens, in whole blocks, that
// the queued program is to drop; 0: none beyond those that are dropped already. The program unmaps them; with a mirror,
// whose programs of the slots have all run by now, this call does, if `cache` is the newest value (its lengths are not
// used). Without one the program checks that.
Status Start(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens,
             const CacheRef& cache, std::vector<std::int64_t>* dropped);
// Whether Start would drop anything of the slot.
Status Drops(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out);

// ---- programs ----
// Unmaps what the edits have dropped. Call this without locks, after they were made.
void Unmap(const PoolParts& pool, const EditList& list);

}  // namespace kvpage::dropping

#endif  // KVPAGE_CACHE_DROPPING_H_
