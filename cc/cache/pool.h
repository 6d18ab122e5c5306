// Pool: the state machine of a KV cache. The host side acquires, extends and releases slots; programs (through the FFI
// handlers) grow, write, read and advance them. No JAX, no Python, no platform.
//
// Two mutexes. mapping_mutex_ guards the arena and is held over system calls; state_mutex_ guards the slot table, the
// epoch and the pins and is held for moments only, so that mapping memory never delays a program that merely reads and
// writes. Order: mapping, then state. Nothing here waits for Python.
//
// On CPU programs call the pool as they run. On a device they go by a mirror of its table (mirror.h): the pool then
// publishes what it decides before it returns, and begins every host call by taking in what programs have done.
#ifndef KVPAGE_CACHE_POOL_H_
#define KVPAGE_CACHE_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/kv_view.h"
#include "base/slot_edits.h"
#include "base/status.h"
#include "cache/arena.h"
#include "cache/geometry.h"
#include "cache/mirror.h"
#include "cache/slot_table.h"

namespace kvpage {

struct PoolOptions {
  bool allow_stale = false;  // a step may be repeated from one cache as long as nothing destructive came between
  bool poison = false;       // test mode: memory handed to a request is filled with NaN
};

// What came of asking for blocks. The numbers are filled in when they did not suffice.
struct Claim {
  Status status;
  std::vector<std::int32_t> slots;
  std::int64_t wanted = 0;    // blocks; slots, for reason kOutOfSlots
  std::int64_t free = 0;      // free outright
  std::int64_t draining = 0;  // will come free when running programs are done
  std::int64_t reclaimable =
      0;  // parked, or mapped beyond what their owner asked for: counted in, taken under pressure
};

struct PoolNumbers {
  std::int64_t blocks_total = 0, blocks_mapped = 0, blocks_parked = 0, blocks_draining = 0, blocks_free = 0;
  std::int64_t blocks_shared = 0, blocks_peak = 0, blocks_warm = 0;
  std::int64_t slots_occupied = 0, slots_draining = 0, slots_parked = 0;
  std::int64_t block_bytes = 0, virtual_bytes = 0, physical_bytes = 0, system_calls = 0, waits = 0;
};

struct SlotRow {
  std::int32_t slot = 0;
  SlotState state = SlotState::kFree;
  std::int64_t blocks = 0;  // physical
  std::int64_t reserved = 0, committed = 0, length = 0;
};

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
  std::int64_t num_tokens = -1;           // rows of q, k, v; -1 when there are none to compare with
};

class Pool;

// A handler at work: while it lives its slots are pinned, so neither their memory nor their owner changes.
class PinnedSlots {
 public:
  PinnedSlots() = default;
  ~PinnedSlots();
  PinnedSlots(const PinnedSlots&) = delete;
  PinnedSlots& operator=(const PinnedSlots&) = delete;

  const std::vector<Sequence>& sequences() const { return sequences_; }
  std::uint32_t epoch() const { return epoch_; }  // the cache's next epoch (mutators)

 private:
  friend class Pool;
  Pool* pool_ = nullptr;
  std::vector<Sequence> sequences_;
  std::uint32_t epoch_ = 0;
  // Marks the sequences' tokens as written in this layer when the op ends.
  static constexpr std::int64_t kNoLayer = -1, kAllLayers = -2;
  std::int64_t written_layer_ = kNoLayer;
};

class Pool {
 public:
  // `mirror`: where programs run on a device of their own.
  static Status Make(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options,
                     std::unique_ptr<Vmm> vmm, std::int64_t map_limit, std::shared_ptr<Pool>* out,
                     std::unique_ptr<Mirror> mirror = nullptr);

  const Geometry& geometry() const { return geometry_; }
  std::int32_t id() const { return id_; }
  void set_id(std::int32_t id) { id_ = id; }
  KVView View() const { return geometry_.View(arena_->base()); }

  // An error in a forked child. Takes no lock, because one may have been held when the process was forked: ask this
  // before anything else that is called from outside.
  Status CheckProcess(const char* op) const;

  // ---- host side (pool.cc) ----
  // Occupies one slot per entry of `tokens` and maps room for that many; all or none.
  Claim Acquire(const std::vector<std::int64_t>& tokens);
  // Maps room for tokens[i] tokens in all in slots[i]; all or none.
  Claim Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
  // Occupied slots start to drain; a queued edit_slots (vacate) ends it.
  Status StartRelease(const std::vector<std::int32_t>& slots);
  // Undoes an Acquire, or a StartRelease, whose program could not be queued: no cache value knows of it.
  void UndoAcquire(const std::vector<std::int32_t>& slots);
  void UndoRelease(const std::vector<std::int32_t>& slots);
  // Names the ids of the next tokens of an occupied slot; none for a slot that is not.
  Status Commit(std::int32_t slot, const std::vector<std::int32_t>& token_ids);
  std::vector<std::int32_t> Committed(std::int32_t slot);
  // Waits for running handlers, makes every older cache stale, ends all draining. The new generation's lengths are -1
  // for free slots.
  struct Generation {
    std::int32_t generation = 0;
    std::uint32_t epoch = 0;
    std::vector<std::int32_t> lengths;
  };
  Status NewGeneration(Generation* out);
  // Waits until something has drained, at most `seconds`; false when nothing was draining or time ran out.
  bool WaitForDrain(double seconds);
  // The first fault that a program left on the device since the last look, as the status that the program would have
  // failed with on CPU. Calls that change something raise it too; NewGeneration, which is the way on after it, and
  // those that only look do not.
  Status TakeFault();
  Status Trim(std::int64_t* freed_blocks);
  Claim Resize(std::int64_t capacity_bytes);
  // Refuses new work, waits for running handlers. The memory goes when the last reference to the pool does.
  void Close();

  // ---- with a mirror (pool_device.cc) ----
  bool mirrored() const { return mirror_ != nullptr; }
  // Makes the pool findable by programs under its id.
  Status OpenMirror();
  // The host's part of map_slots, once the device has checked it: as MapSlots, for a cache of generation `generation`.
  Status MapChecked(const char* op, std::int32_t generation, const std::int32_t* slots, const std::int32_t* tokens,
                    std::int64_t count, bool* ok);

  // ---- looking (pool_inspect.cc) ----
  PoolNumbers Numbers();
  std::vector<SlotRow> Rows();
  Status BlockMap(std::int32_t slot, std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>* out);
  // Pins what a zero-copy array over one layer sees (slot -1: all slots): unwritten memory in it reads as zeros.
  Status AddView(std::int64_t layer, std::int32_t slot);
  void RemoveView(std::int32_t slot);

  // ---- programs (pool_programs.cc); `op` begins every message ----
  Status CheckProgram(const char* op, const SpecInts& spec) const;
  Status MapSlots(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* tokens,
                  std::int64_t count, bool* ok, std::uint32_t* epoch);
  // Starts reading (append false) or writing and possibly reading (append true) one layer.
  Status Begin(const char* op, const CacheRef& cache, const BatchRef& batch, std::int64_t layer, bool append,
               PinnedSlots* pinned);
  Status Advance(const char* op, const CacheRef& cache, const BatchRef& batch, std::uint32_t* epoch,
                 std::int32_t* lengths);
  Status SetLengths(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* values,
                    std::int64_t count, std::uint32_t* epoch, std::int32_t* lengths);
  // What the host verbs queue. The edits are made; the slots of the copies are pinned for the caller to copy, and their
  // targets count as written when `pinned` ends.
  Status EditSlots(const char* op, const CacheRef& cache, const EditList& list, PinnedSlots* pinned,
                   std::uint32_t* epoch, std::int32_t* lengths);

 private:
  friend class PinnedSlots;
  struct Want {
    std::int32_t slot;
    std::int64_t blocks;  // logical, per range
  };

  Pool(const Geometry& geometry, const PoolOptions& options, std::unique_ptr<Arena> arena, std::int64_t map_limit,
       std::unique_ptr<Mirror> mirror);

  // mapping_mutex_ held:
  Claim Reserve(const std::vector<Want>& wants);
  std::int64_t Floor(std::int64_t slot, const std::vector<Want>& wants);
  void Tally(const std::vector<Want>& wants, Claim* claim);
  std::vector<std::int32_t> Donors();
  Status Steal(std::int64_t blocks);
  Status Supply(const Want& want, const std::vector<Want>& wants, std::vector<std::int32_t>* donors);
  std::int32_t BestFit(std::int64_t blocks, const std::vector<bool>& taken);
  Status CheckMapLimit(std::int64_t blocks) const;
  Status Blank(std::int64_t slot, std::int64_t begin, std::int64_t end);
  // Blocks that each of `wants` has in each range.
  std::vector<std::int64_t> Held(const std::vector<Want>& wants) const;
  // Tells the mirror what room there is now; failing that gives back what was mapped beyond `before`.
  Status PublishRoom(const std::vector<Want>& wants, const std::vector<std::int64_t>& before);
  // Maps what pinned slots want; out of blocks is ok[i] = false.
  Status MapPinned(const char* op, const std::int32_t* slots, const std::int32_t* tokens, std::int64_t count, bool* ok);
  Status NewGenerationOnDevice(Generation* out);

  // state_mutex_ held:
  Status CheckEdit(const char* op, const CacheRef& cache, const SlotEdit& edit);
  Status CheckCopies(const char* op, const CacheRef& cache, const EditList& list);
  // `length`: of the slot after the edits.
  Status CheckCopySlot(const char* op, const CacheRef& cache, std::int32_t slot, std::int32_t length);
  Status CheckOpen(const char* op) const;
  Status Enter(const char* op);  // an open pool, without a fault: begins every host call that changes something
  void TakeInReleases();         // slots whose release has run on the device are free
  std::int64_t NumDraining() const;
  Status CheckOccupied(const char* op, std::int32_t slot) const;
  Status CheckGeneration(const char* op, const CacheRef& cache, bool mutates) const;
  Status CheckSlot(const char* op, const CacheRef& cache, std::int32_t slot);
  Status CheckBatch(const char* op, const CacheRef& cache, const BatchRef& batch, std::vector<Sequence>* sequences);
  std::int64_t Room(const Slot& slot) const;
  std::uint32_t NextEpoch();
  void FinishDraining(std::int64_t slot);
  void End(PinnedSlots* pinned);
  bool PollForDrain(double seconds);

  const Geometry geometry_;
  const PoolOptions options_;
  const std::unique_ptr<Arena> arena_;
  const std::int64_t map_limit_;  // mappings this pool may take; 0: no limit known
  const int fork_count_;          // of the process, when the pool was made
  // Ends before the arena does: it waits for programs that may still touch the memory.
  const std::unique_ptr<Mirror> mirror_;
  std::int32_t id_ = -1;

  mutable std::mutex mapping_mutex_;
  mutable std::mutex state_mutex_;
  std::condition_variable changed_;  // a handler ended or a slot drained
  std::vector<Slot> slots_;
  std::vector<std::uint64_t> seen_;  // [slots] stamp of the last batch that named it: finds duplicates
  std::uint64_t stamp_ = 0;
  std::uint64_t parkings_ = 0;
  std::uint32_t epoch_ = 0;
  std::int32_t generation_ = 0;
  std::int32_t running_ = 0;
  std::int32_t arena_views_ = 0;
  std::int64_t waits_ = 0;
  bool closed_ = false;
};

// How often this process's ancestors have forked since the library was loaded: a pool works in the process that made
// it.
int ForkCount();

}  // namespace kvpage

#endif  // KVPAGE_CACHE_POOL_H_
