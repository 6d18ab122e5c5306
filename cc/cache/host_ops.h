// The host verbs that change what slots hold: acquire, extend, release, commit. Accounting is atomic: a call that fails
// changes nothing.
#ifndef KVPAGE_CACHE_HOST_OPS_H_
#define KVPAGE_CACHE_HOST_OPS_H_

#include <cstdint>
#include <vector>

#include "base/slot_edits.h"
#include "cache/parts.h"

namespace kvpage::host_ops {

// Whether Acquire would have slots and blocks for `tokens` now: its claim, without slots. Changes nothing.
Claim CanAcquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Occupies one slot per entry of `tokens` and maps room for that many; all or none.
Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens);
// Maps room for tokens[i] tokens in all in slots[i]; all or none.
Claim Extend(const PoolParts& pool, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
// The host's part of edits that a verb is about to queue, all or none: a slot to be vacated starts to drain. Slots to
// be occupied are Acquire's to choose.
Status StartEdits(const PoolParts& pool, const char* verb, const std::vector<SlotEdit>& edits);
// Undoes a StartEdits, or an Acquire, whose edits could not be queued: no cache value knows of them.
void UndoEdits(const PoolParts& pool, const std::vector<SlotEdit>& edits);
// Takes back an Extend or a Commit of an occupied slot: no more room, in tokens, and no more committed tokens than
// these. The blocks stay mapped as spare ones. For a pool over several devices, where another device's pool failed.
Status Retract(const PoolParts& pool, std::int32_t slot, std::int64_t reserved, std::int64_t committed);
// Names the ids of the next tokens of an occupied slot.
Status Commit(const PoolParts& pool, std::int32_t slot, const std::vector<std::int32_t>& token_ids);
// The ids named so far; none for a slot that is not occupied.
std::vector<std::int32_t> Committed(const PoolParts& pool, std::int32_t slot);

}  // namespace kvpage::host_ops

#endif  // KVPAGE_CACHE_HOST_OPS_H_
