// Sharing: sequences that have their first blocks in common. Fork makes one from another; truncate rolls one back and
// gives it private copies of the blocks that others still need.
//
// A block has one writer at most. Whole blocks of tokens that the host has committed are mapped in the fork too (CPU:
// read-only); SlotProgress::shared keeps programs from writing them in either slot. The tokens of the last, partial
// block are copied by the program that the host queues (edit_slots), which also checks that the donor has written them
// all.
#ifndef KVPAGE_CACHE_SHARING_H_
#define KVPAGE_CACHE_SHARING_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::sharing {

// ---- host ----
// For each request a slot with the first `tokens` committed tokens of its donor, -1: all of them; the slots `released`
// begin to drain. All or nothing. claim.slots and claim.tokens name the new slots and what they have.
Claim Fork(const PoolParts& pool, const char* verb, const std::vector<ForkRequest>& requests,
           const std::vector<std::int32_t>& released);
// Cuts the committed tokens of each slot back, and sets blocks aside for those that other slots share from there on.
// All or nothing. The queued program exchanges them (Separate); with a mirror, whose programs of the slot have all run
// by now, this call does.
Claim Truncate(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
// Whether a truncation to `tokens` must exchange blocks.
Status SharesBehind(const PoolParts& pool, std::int32_t slot, std::int64_t tokens, bool* out);

// ---- programs ----
// Exchanges the blocks that truncations in the list have set aside. Programs that read the slot meanwhile see the same
// tokens. Call this without locks, before the edits are made.
Status Separate(const PoolParts& pool, const char* op, const CacheRef& cache, const EditList& list);

}  // namespace kvpage::sharing

#endif  // KVPAGE_CACHE_SHARING_H_
