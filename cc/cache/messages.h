// Messages about programs that must not continue. CPU handlers return them while the program runs; a device records
// numbers from which the host makes the message later (cc/device/fault.cc). Sharing the text keeps the two from
// diverging.
//
// `op` is the start of every message.
#ifndef KVPAGE_CACHE_MESSAGES_H_
#define KVPAGE_CACHE_MESSAGES_H_

#include <cstdint>
#include <string>

#include "base/status.h"
#include "base/written_runs.h"
#include "cache/geometry.h"

namespace kvpage::messages {

using Op = const std::string&;

// ---- which pool ----
Status NoPool(Op op, std::int32_t id);
Status OtherDevice(Op op, std::int32_t id);
Status Closed(Op op, std::int32_t id);
// addressing="table" on a device: the program is older than the pool, and ran before the pool had a block table there
Status NoTable(Op op, std::int32_t id);
Status ForeignCache(Op op, std::int32_t cache_pool, std::int32_t called_pool);
Status OtherSpec(Op op, std::int32_t id, const SpecInts& program, const SpecInts& pool);

// ---- which cache ----
Status OtherGeneration(Op op, std::int32_t id, std::int64_t cache_generation, std::int64_t pool_generation);
Status StaleEpoch(Op op, std::int32_t id, std::int64_t cache_epoch, std::int64_t pool_epoch);
Status StaleSlot(Op op, std::int32_t slot, std::int64_t cache_epoch, std::int64_t since);

// ---- which slots, layers and tokens ----
Status SlotRange(Op op, std::int32_t slot, std::int64_t max_slots);
Status SlotTwice(Op op, std::int32_t slot);
Status SlotFree(Op op, std::int32_t slot);
Status SlotTaken(Op op, std::int32_t slot, const std::string& how);  // acquire; "already occupied in this cache"
Status OffsetsStart(Op op, std::int64_t first);
Status OffsetsOrder(Op op, std::int64_t index, std::int64_t before, std::int64_t after);
Status LimitOrder(Op op, std::int64_t token, std::int64_t before, std::int64_t limit);
Status OffsetsEnd(Op op, std::int64_t last, std::int64_t num_tokens);
Status LayerRange(Op op, std::int64_t layer, std::int64_t num_layers);
Status MaxSeqLen(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t max_seq_len);
Status Unmapped(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t room);
Status Unwritten(Op op, std::int32_t slot, std::int64_t layer, std::int64_t wanted, std::int64_t written);
// append: the cache says that the slot has more tokens than its occupant has written
Status LengthUnwritten(Op op, std::int32_t slot, std::int64_t layer, std::int64_t length, std::int64_t written);
// append to a pool with KVPool(debug=True): the token at `position` is already written
Status WrittenTwice(Op op, std::int32_t slot, std::int64_t layer, std::int64_t position);
// advance, set_lengths, copies: tokens that every layer must have are missing in some layer
Status UnwrittenSomewhere(Op op, std::int32_t slot, std::int64_t wanted, const WrittenRuns& written);
Status NotLowered(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t length);  // set_lengths
// set_lengths: other slots share tokens behind the new length
Status BelowShared(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t shared);
// append: the tokens from this position on are in blocks that other slots map or have mapped
Status Shared(Op op, std::int32_t slot, std::int64_t position, std::int64_t shared);
Status NotAView(Op op, std::int64_t index, std::int32_t id);

// ---- edit_slots ----
// The op needs positions from `position` on, or sets the length to `wanted`, but tokens below `dropped` are gone; or it
// is to drop more tokens than the slot's `length`.
Status Dropped(Op op, std::int32_t slot, std::int64_t position, std::int64_t dropped);
Status BelowDropped(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t dropped);
Status DropBeyond(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t length);
Status DonorEdited(Op op, std::int32_t slot, std::int32_t donor);  // fork: the same call changes the donor
Status UnknownOpcode(Op op, std::int32_t slot, std::int64_t opcode);
Status CopyTokens(Op op, std::int32_t target, std::int64_t first, std::int64_t count);  // one of them is negative
Status CopyTwice(Op op, std::int32_t target);                                           // two copies into one slot
Status CopyChain(Op op, std::int32_t slot);  // a copy's source is the target of a copy

// ---- copy_rotated ----
// The target has more committed tokens than its length before the copy.
Status CommittedAhead(Op op, std::int32_t slot, std::int64_t committed, std::int64_t length);

}  // namespace kvpage::messages

#endif  // KVPAGE_CACHE_MESSAGES_H_
