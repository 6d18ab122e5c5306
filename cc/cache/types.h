// Arguments and results of a pool's calls: options, claims, numbers, rows, and the cache and batch of programs. Data
// only.
#ifndef KVPAGE_CACHE_TYPES_H_
#define KVPAGE_CACHE_TYPES_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "base/kv_view.h"
#include "base/status.h"

namespace kvpage {

struct PoolOptions {
  bool allow_stale = false;  // a step may be repeated from the same cache if nothing destructive happened in between
  bool poison = false;       // test mode: memory handed to a request is filled with NaN
  bool debug = false;        // test mode: append refuses a token that the slot's occupant has already written
};

// ---- host calls ----

// Life of a slot: free -> occupied (acquire) -> draining (release) -> free, once the release program has run and no
// handler and no view holds it. A free slot whose blocks are still mapped is parked.
enum class SlotState : std::int8_t { kFree = 0, kOccupied = 1, kDraining = 2 };

// The result of asking for blocks. The numbers are set if there were not enough.
struct Claim {
  Status status;
  std::vector<std::int32_t> slots;
  // fork, acquire_prefix: for each slot, the number of tokens with which it begins; fork: of these, the number in
  // blocks shared with the donor. The program copies the others.
  std::vector<std::int64_t> tokens, shared;
  std::vector<std::int32_t> sources;  // acquire_prefix: the donor, if the slot is a fork; else -1
  std::vector<std::int32_t> leaders;  // acquire_prefix: without a slot, the request to wait for; else -1
  std::vector<std::int64_t> stored;   // acquire_prefix: tokens after those found that are in the pool's store
  std::int64_t wanted = 0;            // number of blocks; number of slots for reason kOutOfSlots
  std::int64_t free = 0;              // neither mapped nor otherwise referenced
  std::int64_t draining = 0;          // will become free when running programs are done
  std::int64_t reclaimable = 0;       // parked, or mapped beyond what the owner requested; may be taken when needed
};

inline Claim FailedClaim(Status status) {
  Claim claim;
  claim.status = std::move(status);
  return claim;
}

// A new sequence with the first tokens of another.
struct ForkRequest {
  std::int32_t donor = 0;
  std::int64_t tokens = -1;  // -1: all committed tokens
};

// Totals since the pool was created.
struct SwapCounts {
  std::int64_t swapped_out = 0, swapped_in = 0;              // sequences
  std::int64_t bytes_swapped_out = 0, bytes_swapped_in = 0;  // written to the store, read from it
};

// Totals of sequences handed over to and received from other processes, and the bytes copied for this.
struct HandoverCounts {
  std::int64_t exported = 0, imported = 0;
  std::int64_t bytes_copied_out = 0, bytes_copied_in = 0;
};

// Every block counts once, no matter how many slots map it.
struct PoolNumbers {
  std::int64_t blocks_total = 0, blocks_mapped = 0, blocks_parked = 0, blocks_draining = 0, blocks_free = 0;
  std::int64_t blocks_spare = 0, blocks_shared = 0, blocks_cached = 0, blocks_peak = 0, blocks_warm = 0;
  std::int64_t slots_occupied = 0, slots_draining = 0, slots_parked = 0;
  std::int64_t prefix_queries = 0, prefix_hits = 0, prefix_tokens = 0, prefix_evictions = 0;
  std::int64_t sequences_swapped = 0, blocks_swapped = 0;  // current number; in memory
  SwapCounts swaps;
  HandoverCounts handovers;
  std::int64_t blocks_received = 0;  // with memory in files of other pools
  std::int64_t block_bytes = 0, virtual_bytes = 0, physical_bytes = 0, system_calls = 0, waits = 0;
  std::int64_t memory_mappings = 0;  // of the process, for blocks of slots; 0 with a mirror
};

// One row of the valid slot table.
struct SlotRow {
  std::int32_t slot = 0;
  SlotState state = SlotState::kFree;
  std::int64_t blocks = 0;  // mapped by this slot; a shared block appears in several rows
  std::int64_t shared = 0;  // of these, mapped in other slots too
  std::int64_t reserved = 0, committed = 0, length = 0;
  std::int64_t views = 0;    // live zero-copy arrays over it
  bool vacated = false;      // draining, and its release program has run
  std::int64_t dropped = 0;  // leading tokens that were dropped
};

// For each range of a slot, its blocks in logical order: (physical block, references to it); (-1, 0) if dropped.
using BlockReferences = std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>;

// A physical block that a slot maps, the slots that map it, and the one that maps it for writing (-1: none any more).
// Block -1 was dropped.
struct BlockRow {
  std::int32_t block = 0;
  std::int32_t references = 0;
  std::int32_t owner = -1;
  std::vector<std::int32_t> slots;
};
using BlockRows = std::vector<std::vector<BlockRow>>;  // as BlockReferences
// Address and size in bytes of each range of a slot.
using MemoryRanges = std::vector<std::pair<std::uint64_t, std::int64_t>>;

// A generation as the host sees it start.
struct Generation {
  std::int32_t generation = 0;
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;  // -1 if the slot is free
};

// ---- programs ----

// The cache as a program carries it.
struct CacheRef {
  std::int32_t generation = 0;
  std::uint32_t epoch = 0;
  const std::int32_t* lengths = nullptr;  // [max_slots]
};

// A ragged batch as a program carries it.
struct BatchRef {
  const std::int32_t* slots = nullptr;  // [num_sequences]
  std::int64_t num_sequences = 0;
  const std::int32_t* offsets = nullptr;  // [num_sequences + 1]
  std::int64_t num_tokens = -1;           // rows of q, k, v; -1 if there are none
  // For ops that read: the sliding window; <= 0: they read everything. An op that appends reads only if it attends.
  std::int32_t window = 0;
  bool attends = false;
  // [num_tokens] For an op that reads without appending: the last position that each new token sees, at least 0 and not
  // decreasing within a sequence. Replaces the causal rule; lengths then only say which slots are occupied. May be
  // null.
  const std::int32_t* limits = nullptr;
};

// The slots that a running handler pins.
struct Pins {
  static constexpr std::int64_t kNoLayer = -1, kAllLayers = -2;
  std::vector<Sequence> sequences;
  bool by_block = false;                  // the handler addresses blocks by number and has a copy of the block table
  std::uint32_t epoch = 0;                // the cache's next epoch (mutators)
  std::int64_t written_layer = kNoLayer;  // the layer in which the tokens count as written when the op ends
};

// The sequences of a handler that addresses blocks by number, in the form that kernels use.
struct TableCall {
  KVView view;                       // of one layer; its table points to `blocks`
  std::vector<std::int32_t> blocks;  // a row for each sequence
  std::vector<Sequence> sequences;   // the pinned sequences, with row numbers in place of slots
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_TYPES_H_
