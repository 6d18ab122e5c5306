// The pool's table as programs on a device see it: plain structs in device memory that kernels check themselves
// against.
//
// Handlers on a device read no operand on the host: a program carries ids, and its kernels resolve them here. The table
// of pools lies at one address per device for as long as the process lives. Fields marked "host" are written by the
// host (through Mirror), the others by the check that every launch begins with; a launch that fails its check writes
// nothing but the first fault.
#ifndef KVPAGE_BASE_DEVICE_TABLE_H_
#define KVPAGE_BASE_DEVICE_TABLE_H_

#include <cstdint>

#include "base/kv_view.h"
#include "base/op_names.h"
#include "base/spec_fields.h"
#include "base/written_runs.h"

namespace kvpage {

// Live pools that one device can serve. Pool `id` (ids are positive) is found by looking on, around the table, from
// entry id % kMaxDevicePools; an entry that was never used (kEmptyEntry) ends the search, one that a pool has left
// (kLeftEntry) does not. Behind these stands one entry more: entry kMaxDevicePools is no pool, its `faulted` and
// `fault` take the faults of programs whose pool is not in the table.
inline constexpr std::int32_t kMaxDevicePools = 256;
inline constexpr std::int32_t kDeviceTableEntries = kMaxDevicePools + 1;
inline constexpr std::int32_t kEmptyEntry = -1;
inline constexpr std::int32_t kLeftEntry = -2;

enum class FaultKind : std::int32_t {
  kNone = 0,
  kNoPool,        // have: id in the handle; never a pool of this device
  kClosed,        // the pool is closed
  kSpec,          // index: which SpecField; wanted: the program's, have: the pool's
  kGeneration,    // wanted: the cache's generation, have: the pool's
  kEpoch,         // wanted: the cache's epoch, have: the pool's
  kSlotEpoch,     // slot; wanted: the cache's epoch, have: since[slot]
  kSlotRange,     // slot
  kSlotTwice,     // slot
  kSlotFree,      // slot: free in the cache value
  kSlotTaken,     // slot: acquire finds it occupied in the cache value
  kOffsetsStart,  // have: query_offsets[0]
  kOffsetsOrder,  // index: s; wanted: query_offsets[s], have: query_offsets[s + 1]
  kOffsetsEnd,    // wanted: the last offset, have: number of tokens
  kLayer,         // wanted: the layer
  kMaxSeqLen,     // slot; wanted tokens
  kUnmapped,      // slot; wanted tokens, have: room
  kUnwritten,     // slot, layer; wanted tokens, have: written. Layer -1, all of them: index: written counts up to here
                  // only (-1: no limit), runs: what is written
  kRaise,         // slot: set_lengths; wanted: the new length, have: the present one
  kForeignCache,  // wanted: id of the cache's pool, have: id of the pool that was called
  kOpcode,        // slot; wanted: an opcode that edit_slots does not know
  kCopyTokens,    // slot: a copy's target; wanted: first token, have: number of tokens
  kCopyTwice,     // slot: the target of two copies
  kCopyChain,     // slot: the source and the target of copies
  kLength,        // slot, layer; wanted: tokens that the cache says it has, have: written
  kWrittenTwice,  // slot, layer; wanted: the position of the first new token, which is already written
  kBelowShared,   // slot: set_lengths; wanted: the new length, have: where what other slots share ends
  kShared,        // slot: append; wanted: the position, have: where what other slots share ends
  kDonorEdited,   // slot: fork; have: the donor
  kDropped,       // slot; wanted: the first position that the op needs, have: dropped
  kBelowDropped,  // slot: set_lengths, truncate; wanted: the new length, have: dropped
  kDropBeyond,    // slot: drop_before; wanted: its first token that stays, have: the length
  kNoTable,       // addressing="table": the pool has no block table on this device
  kCommittedAhead,  // slot: the target of a segment; wanted: its committed tokens, have: its length
};

// Pinned host memory: the first fault since the host last looked.
struct Fault {
  std::uint32_t set = 0;  // written last
  std::int32_t kind = 0;  // FaultKind
  std::int32_t op = 0;    // DeviceOp
  std::int32_t slot = -1;
  std::int32_t layer = -1;
  std::int32_t index = -1;
  std::int64_t wanted = 0;
  std::int64_t have = 0;
  WrittenRuns runs;
};

// acquire and release both leave a slot with length 0 and nothing written in any layer, so that no generation that the
// host starts (which copies these fields) can show a slot's new owner the tokens of the last one.
struct DeviceSlot {
  std::int32_t room = 0;    // host: tokens that may be written
  std::uint32_t since = 0;  // epoch of the last destructive change
  std::int32_t length = 0;  // as the last completed step left it
  // 1 until the first acquire, from release to the next one, and for every free slot when a generation starts: there is
  // no room, even where the host's last word was another. A cache value may be of the newest epoch and still show such
  // a slot as occupied (on_stale="allow", or lengths that a program changed); its memory may be gone.
  std::int32_t released = 0;
  // Positions below this are not the slot's alone: no program may write there, or lower the length below it.
  std::int32_t shared = 0;
  // Positions below this have no memory. The host writes it before it unmaps them; acquire clears it.
  std::int32_t dropped = 0;
};

// The physical blocks of slots' first tokens, as far as other slots have ever mapped them too (SharedRuns).
// A slot that has dropped its beginning has none.
struct DeviceRuns {
  const std::int32_t* blocks = nullptr;  // [max_slots, width]; null: no slots share anything
  const std::int32_t* counts = nullptr;  // [max_slots] blocks of a run
  std::int64_t width = 0;
};

struct DevicePool {
  std::int32_t id = kEmptyEntry;           // host
  std::int32_t open = 0;                   // host
  std::int32_t generation = 0;             // host
  std::int32_t allow_stale = 0;            // host
  std::uint32_t epoch = 0;                 // bumped by mutators
  std::uint32_t faulted = 0;               // set by the first fault, cleared by the host
  std::int64_t spec[kNumSpecFields] = {};  // host; Geometry::spec()
  KVView view;                             // host
  // Host. The same blocks through the block table, of layer 0; its table is null until some program needs it
  // (Mirror::OpenTable). The numbers of the next layer begin table_layer_stride behind.
  KVView table_view;
  std::int64_t table_layer_stride = 0;
  DeviceSlot* slots = nullptr;      // [max_slots]
  std::int32_t* written = nullptr;  // [max_slots, num_layers] tokens written by the slot's occupant
  std::uint32_t* marks = nullptr;   // [max_slots], of checks without scratch memory: finds slots named twice
  Fault* fault = nullptr;           // pinned host memory
  DeviceRuns runs;                  // host
  // host: cuts of runs so far. A run is cut, and this goes up, before a mapping changes: what was found in the runs
  // holds as long as this number does.
  std::uint32_t run_cuts = 0;
  std::int32_t debug = 0;  // host; PoolOptions::debug
  // Pinned host memory, [max_slots]: set by release when everything queued before it on the stream is done, to one more
  // than the tokens that were written in every layer. The host clears it when it hands the slot on. Reading it costs no
  // driver call.
  volatile std::uint32_t* vacated = nullptr;
  // Blocks of running ops that may use the pool. It belongs to the entry, not to the pool: an op may be counted here
  // for a moment before it sees that the pool is another. Last in the struct, because the host never writes it.
  std::uint32_t readers = 0;
};

// The result of the check that begins a launch, for the kernels behind it.
struct CheckedBatch {
  std::int32_t ok = 0;  // 0: write nothing, output NaN
  std::int32_t layer = 0;
  std::int32_t num_sequences = 0;
  std::int32_t sliding_window = 0;
  std::int32_t groups_hold = 0;  // 1: the sequences that the plan groups share what they did when it was made
  KVView view;
  std::uint32_t* readers = nullptr;  // where the blocks of the op's last kernel count themselves out; null: nowhere
  // [num_sequences] of the batch, in its order, at the address behind this struct; slot -1: inactive.
  KVPAGE_HOST_DEVICE Sequence* sequences() { return reinterpret_cast<Sequence*>(this + 1); }
  KVPAGE_HOST_DEVICE const Sequence* sequences() const { return reinterpret_cast<const Sequence*>(this + 1); }
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_DEVICE_TABLE_H_
