// The pool's table as device programs see it: plain structs in device memory against which kernels check themselves.
//
// Handlers on a device do not read operands on the host: a program carries ids, and its kernels resolve them here. The
// table of pools stays at one address per device for the lifetime of the process. Fields marked "host" are written by
// the host (through Mirror), the others by the check at the start of every launch. A launch whose check fails writes
// nothing but the first fault.
#ifndef KVPAGE_BASE_DEVICE_TABLE_H_
#define KVPAGE_BASE_DEVICE_TABLE_H_

#include <cstdint>

#include "base/kv_view.h"
#include "base/op_names.h"
#include "base/spec_fields.h"
#include "base/written_runs.h"

namespace kvpage {

// The most live pools per device. To find pool `id` (ids are positive), start at entry id % kMaxDevicePools and probe
// linearly, wrapping around. An entry that was never used (kEmptyEntry) ends the search; one that a pool has left
// (kLeftEntry) does not. There is one more entry, kMaxDevicePools, which is not a pool: its `faulted` and `fault`
// record faults of programs whose pool is not in the table.
inline constexpr std::int32_t kMaxDevicePools = 256;
inline constexpr std::int32_t kDeviceTableEntries = kMaxDevicePools + 1;
inline constexpr std::int32_t kEmptyEntry = -1;
inline constexpr std::int32_t kLeftEntry = -2;

enum class FaultKind : std::int32_t {
  kNone = 0,
  kNoPool,        // have: id in the handle, which was never a pool of this device
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
  kUnwritten,     // slot, layer; wanted tokens, have: written. Layer -1 stands for all layers; index: at most this many
                  // tokens count as written (-1: no limit), runs: what is written
  kRaise,         // slot: set_lengths; wanted: the new length, have: the current length
  kForeignCache,  // wanted: id of the cache's pool, have: id of the pool that was called
  kOpcode,        // slot; wanted: an opcode unknown to edit_slots
  kCopyTokens,    // slot: a copy's target; wanted: first token, have: number of tokens
  kCopyTwice,     // slot: the target of two copies
  kCopyChain,     // slot: both source and target of copies
  kLength,        // slot, layer; wanted: tokens that the cache says it has, have: written
  kWrittenTwice,  // slot, layer; wanted: the position of the first new token, which is already written
  kBelowShared,   // slot: set_lengths; wanted: the new length, have: the end of what is shared with other slots
  kShared,        // slot: append; wanted: the position, have: the end of what is shared with other slots
  kDonorEdited,   // slot: fork; have: the donor
  kDropped,       // slot; wanted: the first position that the op needs, have: dropped
  kBelowDropped,  // slot: set_lengths, truncate; wanted: the new length, have: dropped
  kDropBeyond,    // slot: drop_before; wanted: the first token to keep, have: the length
  kNoTable,       // addressing="table": the pool has no block table on this device
  kCommittedAhead,  // slot: the target of a segment; wanted: its committed tokens, have: its length
};

// In pinned host memory: the first fault since the host last took one.
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

// acquire and release both leave a slot with length 0 and nothing written in any layer. So a generation that the host
// starts (which copies these fields) never shows a slot's new owner the tokens of the previous one.
struct DeviceSlot {
  std::int32_t room = 0;    // host: tokens that may be written
  std::uint32_t since = 0;  // epoch of the last destructive change
  std::int32_t length = 0;  // as the last completed step left it
  // 1 until the first acquire, from each release to the next acquire, and for every free slot when a generation starts.
  // There is then no room, whatever `room` says. A cache value may have the newest epoch and still show such a slot as
  // occupied (on_stale="allow", or lengths that a program changed), while its memory may be gone.
  std::int32_t released = 0;
  // Positions below this are shared with other slots: no program may write there or lower the length below it.
  std::int32_t shared = 0;
  // Positions below this have no memory. The host sets it before it unmaps them; acquire clears it.
  std::int32_t dropped = 0;
};

// The physical blocks at the beginning of each slot that other slots have mapped too at some time (SharedRuns). Empty
// for a slot that has dropped its beginning.
struct DeviceRuns {
  const std::int32_t* blocks = nullptr;  // [max_slots, width]; null if no slots share anything
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
  // Host. The same blocks, in layer 0, accessed through the block table. The view's table is null until a program needs
  // it (Mirror::OpenTable). Each layer's numbers are table_layer_stride after those of the previous layer.
  KVView table_view;
  std::int64_t table_layer_stride = 0;
  DeviceSlot* slots = nullptr;      // [max_slots]
  std::int32_t* written = nullptr;  // [max_slots, num_layers] tokens written by the slot's occupant
  std::uint32_t* marks = nullptr;   // [max_slots], for checks without scratch memory: finds duplicate slots
  Fault* fault = nullptr;           // pinned host memory
  DeviceRuns runs;                  // host
  // Host: number of cuts of runs so far. Before a mapping changes, runs are cut and this is incremented, so what was
  // found in the runs is valid as long as this number stays the same.
  std::uint32_t run_cuts = 0;
  std::int32_t debug = 0;  // host; PoolOptions::debug
  // [max_slots] in pinned host memory. Set by release when everything queued before it on the stream is done, to the
  // number of tokens written in every layer plus one. The host clears it when it reuses the slot. Reading it costs no
  // driver call.
  volatile std::uint32_t* vacated = nullptr;
  // Blocks of running ops that may use the pool. Belongs to the entry, not to the pool: an op may be counted here
  // briefly before it sees that this is another pool. Last in the struct, because the host never writes it.
  std::uint32_t readers = 0;
};

// The result of the check at the start of a launch, for the kernels that follow.
struct CheckedBatch {
  std::int32_t ok = 0;  // 0: write nothing, output NaN
  std::int32_t layer = 0;
  std::int32_t num_sequences = 0;
  std::int32_t sliding_window = 0;
  std::int32_t groups_hold = 0;  // 1: the plan's groups still share what they did when the plan was made
  KVView view;
  std::uint32_t* readers = nullptr;  // the blocks of the last kernel count themselves out here; may be null
  // [num_sequences] of the batch, in order, stored right after this struct; slot -1: inactive.
  KVPAGE_HOST_DEVICE Sequence* sequences() { return reinterpret_cast<Sequence*>(this + 1); }
  KVPAGE_HOST_DEVICE const Sequence* sequences() const { return reinterpret_cast<const Sequence*>(this + 1); }
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_DEVICE_TABLE_H_
