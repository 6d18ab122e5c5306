// Sharing: sequences that have their first blocks in common. Fork creates one from another; truncate rolls one back and
// gives it private copies of blocks that others still need.
//
// A block has at most one writer. Full blocks of committed tokens are also mapped in the fork (on CPU, read-only);
// SlotProgress::shared keeps programs from writing them in either slot. The tokens of the last, partial block are
// copied by the program that the host queues (edit_slots), which also checks that the donor has written all of the
// tokens.
#ifndef KVPAGE_CACHE_SHARING_H_
#define KVPAGE_CACHE_SHARING_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::sharing {

// ---- host ----
// Acquires for each request a slot with the first `tokens` committed tokens of its donor (-1: all); the slots
// `released` begin to drain. All or nothing. claim.slots and claim.tokens are the new slots and their lengths.
Claim Fork(const PoolParts& pool, const char* verb, const std::vector<ForkRequest>& requests,
           const std::vector<std::int32_t>& released);
// Cuts the committed tokens of each slot, and sets blocks aside for those that other slots share after the cut. All or
// nothing. The queued program replaces the blocks (Separate). With a mirror, this call does, because all programs of
// the slots have run.
Claim Truncate(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
// Whether a truncation to `tokens` must replace blocks.
Status SharesBehind(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out);

// ---- programs ----
// Replaces blocks for which truncations in the list have set others aside. Programs that read the slot meanwhile see
// the same tokens. Call this without locks, before the edits are made.
Status Separate(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list);

}  // namespace kvpage::sharing

#endif  // KVPAGE_CACHE_SHARING_H_
