// Host calls that change the contents of slots: acquire, extend, release, commit. A call that fails changes nothing.
#ifndef KVPAGE_CACHE_HOST_OPS_H_
#define KVPAGE_CACHE_HOST_OPS_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::host_ops {

// Returns the claim that Acquire would make now, without choosing slots. Changes nothing.
Claim CanAcquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Occupies one slot per entry of `tokens` and maps room for this many tokens. All or nothing.
Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Maps room for a total of tokens[i] tokens in slots[i]. All or nothing.
Claim Extend(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
// The host's part of edits that a call is about to queue: slots to be vacated start to drain. All or nothing. Acquire
// chooses the slots to be occupied.
Status StartEdits(const PoolParts& pool, const char* verb, const std::vector<SlotEdit>& edits);
// Undoes StartEdits or Acquire if the edits could not be queued; no cache value refers to them.
void UndoEdits(const PoolParts& pool, const std::vector<SlotEdit>& edits);
// Undoes an Extend or a Commit of an occupied slot: limits its room and its committed tokens to these numbers. The
// blocks stay mapped as spare ones. Used if the call failed in the pool of another device.
Status Retract(const PoolParts& pool, std::int32_t slot, std::int64_t reserved, std::int64_t committed);
// Appends the ids of the next tokens of an occupied slot.
Status Commit(const PoolParts& pool, std::int32_t slot, const std::vector<std::int32_t>& token_ids);
// The ids committed so far; empty if the slot is not occupied.
std::vector<std::int32_t> Committed(const PoolParts& pool, std::int32_t slot);

}  // namespace kvpage::host_ops

#endif  // KVPAGE_CACHE_HOST_OPS_H_
