#include "cache/messages.h"

#include <algorithm>

namespace kvpage::messages {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }
std::string Pool(std::int32_t id) { return "pool " + Number(id); }
std::string Slot(Op op, std::int32_t slot) { return op + ": slot " + Number(slot); }

// "layer 0: 5, layers 1..3: 0"
std::string Runs(const WrittenRuns& runs) {
  std::string text;
  for (std::int32_t i = 0; i < std::min(runs.count, WrittenRuns::kMost); ++i) {
    const std::int32_t first = i == 0 ? 0 : runs.last_layer[i - 1] + 1, last = runs.last_layer[i];
    text += (i == 0 ? "" : ", ") +
            (first == last ? "layer " + Number(first) : "layers " + Number(first) + ".." + Number(last));
    text += ": " + Number(runs.tokens[i]);
  }
  return runs.count > WrittenRuns::kMost ? text + ", ..." : text;
}

}  // namespace

Status NoPool(Op op, std::int32_t id) {
  return FailedPrecondition(op + ": there is no " + Pool(id) +
                            " in this process: a cache works in the process that made it");
}

Status OtherDevice(Op op, std::int32_t id) {
  return FailedPrecondition(op + ": " + Pool(id) +
                            " is not on the device that the program ran on: run it on the pool's device, or make the "
                            "pool with KVPool(..., device=...)");
}

Status Closed(Op op, std::int32_t id) {
  return FailedPrecondition(
      op + ": " + Pool(id) +
          " is closed: make a new pool, or close this one only when the results of its programs are ready",
      Reason::kClosed);
}

Status NoTable(Op op, std::int32_t id) {
  return FailedPrecondition(op + ": " + Pool(id) +
                            " had no block table on its device yet when the program ran: run it again");
}

Status ForeignCache(Op op, std::int32_t cache_pool, std::int32_t called_pool) {
  return FailedPrecondition(op + ": this cache belongs to " + Pool(cache_pool) + ", but " + Pool(called_pool) +
                            " was called: pass the cache that this pool's newest call returned");
}

Status OtherSpec(Op op, std::int32_t id, const SpecInts& program, const SpecInts& pool) {
  return FailedPrecondition(op + ": the program was compiled for another spec than " + Pool(id) +
                            "'s: " + DescribeDifference(program, pool) + ". Use a cache from a pool of the same spec");
}

Status OtherGeneration(Op op, std::int32_t id, std::int64_t cache_generation, std::int64_t pool_generation) {
  return FailedPrecondition(op + ": stale cache: it belongs to generation " + Number(cache_generation) + " of " +
                            Pool(id) + ", which is at generation " + Number(pool_generation) +
                            " since pool.cache() was last called: use the cache which that call returned");
}

Status StaleEpoch(Op op, std::int32_t id, std::int64_t cache_epoch, std::int64_t pool_epoch) {
  return FailedPrecondition(op + ": stale cache: it is at epoch " + Number(cache_epoch) + ", " + Pool(id) +
                            " is at epoch " + Number(pool_epoch) +
                            ". Go on from the cache that the newest call returned, call pool.cache() for a new one, or "
                            "make the pool with on_stale=\"allow\" to repeat a step from one cache");
}

Status StaleSlot(Op op, std::int32_t slot, std::int64_t cache_epoch, std::int64_t since) {
  return FailedPrecondition(op + ": stale cache: it is at epoch " + Number(cache_epoch) + ", but slot " + Number(slot) +
                            " was acquired, released or rolled back at epoch " + Number(since) +
                            ": use the cache that the newest call returned");
}

Status SlotRange(Op op, std::int32_t slot, std::int64_t max_slots) {
  return InvalidArgument(Slot(op, slot) + " does not exist: slots are 0.." + Number(max_slots - 1) + ", -1 is padding");
}

Status SlotTwice(Op op, std::int32_t slot) {
  return InvalidArgument(Slot(op, slot) + " is named twice in one call: a sequence may appear once");
}

Status SlotFree(Op op, std::int32_t slot) {
  return FailedPrecondition(Slot(op, slot) +
                            " is free in this cache: acquire it first and use the cache that acquire returned, or mask "
                            "the sequence with batch.mask");
}

Status SlotTaken(Op op, std::int32_t slot, const std::string& how) {
  return FailedPrecondition(Slot(op, slot) + " is " + how +
                            ": use the newest cache, or start a new generation with pool.cache()");
}

Status OffsetsStart(Op op, std::int64_t first) {
  return InvalidArgument(op + ": query_offsets[0] is " + Number(first) + ", wanted 0");
}

Status LimitOrder(Op op, std::int64_t token, std::int64_t before, std::int64_t limit) {
  return InvalidArgument(op + ": new token " + Number(token) + " sees positions up to " + Number(limit) +
                         ", wanted at least " + Number(before) + ", the limit of an earlier token");
}

Status OffsetsOrder(Op op, std::int64_t index, std::int64_t before, std::int64_t after) {
  return InvalidArgument(op + ": query_offsets must not decrease: [" + Number(index) + "] is " + Number(before) +
                         ", [" + Number(index + 1) + "] is " + Number(after));
}

Status OffsetsEnd(Op op, std::int64_t last, std::int64_t num_tokens) {
  return InvalidArgument(op + ": query_offsets end at " + Number(last) + ", but there are " + Number(num_tokens) +
                         " tokens");
}

Status LayerRange(Op op, std::int64_t layer, std::int64_t num_layers) {
  return OutOfRange(op + ": layer is " + Number(layer) + ", wanted 0.." + Number(num_layers - 1));
}

Status MaxSeqLen(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t max_seq_len) {
  return OutOfRange(Slot(op, slot) + ": " + Number(wanted) + " tokens wanted, max_seq_len is " + Number(max_seq_len));
}

Status Unmapped(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t room) {
  return OutOfRange(Slot(op, slot) + ": " + Number(wanted) + " tokens wanted, " + Number(room) +
                    " mapped: map_slots in the program or pool.extend before it makes room");
}

Status Unwritten(Op op, std::int32_t slot, std::int64_t layer, std::int64_t wanted, std::int64_t written) {
  return FailedPrecondition(Slot(op, slot) + ", layer " + Number(layer) + ": " + Number(wanted) + " tokens wanted, " +
                            Number(written) +
                            " written: the new tokens' keys and values must be appended first (append_kv, or "
                            "update_and_attend for both)");
}

Status LengthUnwritten(Op op, std::int32_t slot, std::int64_t layer, std::int64_t length, std::int64_t written) {
  return FailedPrecondition(Slot(op, slot) + ", layer " + Number(layer) + ": the cache says that it has " +
                            Number(length) + " tokens, " + Number(written) +
                            " written: only advance raises a length; use the cache that the newest call "
                            "returned, or call pool.cache() for a new one");
}

Status WrittenTwice(Op op, std::int32_t slot, std::int64_t layer, std::int64_t position) {
  return FailedPrecondition(Slot(op, slot) + ", layer " + Number(layer) + ": position " + Number(position) +
                            " is already written: advance(cache, batch) was probably forgotten after the previous "
                            "step, or one layer was written twice with the same layer number. set_lengths allows new "
                            "tokens from the slot's length on to be written again; KVPool(debug=True) checks this");
}

Status UnwrittenSomewhere(Op op, std::int32_t slot, std::int64_t wanted, const WrittenRuns& written) {
  return FailedPrecondition(Slot(op, slot) + ": " + Number(wanted) + " tokens wanted, written in " + Runs(written) +
                            "; append_kv or update_and_attend must run once for every layer first");
}

Status NotLowered(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t length) {
  return OutOfRange(Slot(op, slot) + ": length " + Number(wanted) + " wanted, it is " + Number(length) +
                    ": set_lengths lowers only (to 0 at least), advance raises");
}

Status BelowShared(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t shared) {
  return FailedPrecondition(
      Slot(op, slot) + ": length " + Number(wanted) + " wanted, but its tokens below " + Number(shared) +
      " are shared with other slots or processes: pool.truncate(cache, slot, num_tokens) rolls it back");
}

Status Shared(Op op, std::int32_t slot, std::int64_t position, std::int64_t shared) {
  return FailedPrecondition(Slot(op, slot) + ": the cache says that it has " + Number(position) +
                            " tokens, and its tokens below " + Number(shared) +
                            " are shared with other slots or processes: new tokens would overwrite them. "
                            "pool.truncate(cache, slot, num_tokens) makes a "
                            "private copy");
}

Status Dropped(Op op, std::int32_t slot, std::int64_t position, std::int64_t dropped) {
  return FailedPrecondition(Slot(op, slot) + ": tokens from position " + Number(position) +
                            " on are needed, but those below " + Number(dropped) +
                            " were dropped (pool.drop_before): only attention with a sliding_window that begins at or "
                            "after them can read the slot; read_kv and implementation=\"xla\" copy all of it");
}

Status BelowDropped(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t dropped) {
  return FailedPrecondition(Slot(op, slot) + ": length " + Number(wanted) + " wanted, but its tokens below " +
                            Number(dropped) + " were dropped (pool.drop_before): it cannot become shorter than that");
}

Status DropBeyond(Op op, std::int32_t slot, std::int64_t wanted, std::int64_t length) {
  return OutOfRange(Slot(op, slot) + ": cannot drop its tokens below " + Number(wanted) + ", it has " + Number(length));
}

Status DonorEdited(Op op, std::int32_t slot, std::int32_t donor) {
  return InvalidArgument(Slot(op, slot) + " takes tokens of slot " + Number(donor) +
                         ", which the same call changes: change it in another call");
}

Status NotAView(Op op, std::int64_t index, std::int32_t id) {
  return InvalidArgument(op + ": array " + Number(index) + " of the views is not the memory of " + Pool(id) +
                         " but a copy, or a view of another pool, and does not show what programs write: pass the "
                         "arrays that this pool's view() returned to the jitted function as arguments (closed over, "
                         "they are copied), and slice, gather or convert them inside the function that reads them");
}

Status UnknownOpcode(Op op, std::int32_t slot, std::int64_t opcode) {
  return InvalidArgument(Slot(op, slot) + ": this version of jax_kvpage has no edit with opcode " + Number(opcode) +
                         ": compile the program again");
}

Status CopyTokens(Op op, std::int32_t target, std::int64_t first, std::int64_t count) {
  return InvalidArgument(Slot(op, target) + ": the copy into it takes " + Number(count) + " tokens from token " +
                         Number(first) + " on: neither number may be negative");
}

Status CopyTwice(Op op, std::int32_t target) {
  return InvalidArgument(Slot(op, target) + " is the target of two copies in one call: it may be the target of one");
}

Status CopyChain(Op op, std::int32_t slot) {
  return InvalidArgument(Slot(op, slot) +
                         " is the source and the target of copies in one call: queue the second one in another call");
}

Status CommittedAhead(Op op, std::int32_t slot, std::int64_t committed, std::int64_t length) {
  return FailedPrecondition(Slot(op, slot) + ": " + Number(committed) + " tokens are committed, but it has " +
                            Number(length) +
                            ": commit the tokens of a segment after the call that copies it, or other requests could "
                            "find them as a prefix");
}

}  // namespace kvpage::messages
