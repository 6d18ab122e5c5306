// The check at the start of every op on a pool: one block compares the cache value that a program carries with the
// pool's table, exactly as cache/program_check.h does on CPU, and records the first fault.
//
// "First" means in the order of a loop over the sequences, regardless of which thread found it: every fault has a key
// for this order (the stage of the check, then the sequence), and the fault with the smallest key is recorded.
#ifndef KVPAGE_KERNELS_CUDA_CHECKER_CUH_
#define KVPAGE_KERNELS_CUDA_CHECKER_CUH_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/epoch.h"
#include "base/spec_fields.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/readers.cuh"

namespace kvpage::cuda {

inline constexpr int kCheckThreads = 256;

// CacheOperands as passed to kernels.
struct CacheArgs {
  DevicePool* pools;
  const std::int32_t* handle;
  const std::uint32_t* epoch;
  const std::int32_t* lengths;
  const std::int32_t* own;  // handle of the pool that was called, or null
  std::int64_t spec[kNumSpecFields];
  DeviceOp op;
  bool mutates;
  std::uint32_t followers;  // number of blocks of the op's last kernel; 0 if the check is the last one
  std::uint32_t* marks;     // [max_slots], used by this op alone; null: use the pool's (kSharedMarks)

  __device__ std::int32_t num_layers() const { return static_cast<std::int32_t>(spec[kSpecNumLayers]); }
  __device__ std::int32_t max_slots() const { return static_cast<std::int32_t>(spec[kSpecMaxSlots]); }
  __device__ std::int64_t max_seq_len() const { return spec[kSpecMaxSeqLen]; }
};

inline CacheArgs ToArgs(const CacheOperands& cache, bool mutates, const std::int32_t* own = nullptr,
                        std::int64_t followers = 0) {
  CacheArgs args = {cache.pools,   cache.handle, cache.epoch,
                    cache.lengths, own,          {},
                    cache.op,      mutates,      static_cast<std::uint32_t>(followers),
                    nullptr};
  for (int i = 0; i < kNumSpecFields; ++i) args.spec[i] = cache.spec[i];
  return args;
}

// Dynamic shared memory of a check: the marks, or a single unused element.
inline std::size_t CheckSharedBytes(const CacheOperands& cache) {
  const bool shared = cache.spec[kSpecMaxSlots] > 0 && cache.spec[kSpecMaxSlots] <= kSharedMarks;
  return sizeof(std::uint32_t) * (shared ? static_cast<std::size_t>(cache.spec[kSpecMaxSlots]) : 1);
}

// The launch shape of a check with one block.
inline LaunchShape OneBlock(const CacheOperands& cache) { return {1, kCheckThreads, CheckSharedBytes(cache), false}; }

// Stages of a check, in the same order as on CPU.
enum class Stage : std::uint32_t {
  kHead = 0,
  kOffsets,
  kSlots,
  kLimits,
  kForks,  // from here on only edit_slots: donors, once the slots of all edits are valid
  kCopies,
  kTargets,  // a slot that is the target of two copies
  kSources,  // a slot that is both target and source
  kNothing = 0xffffffffu
};

// State shared by the block during a check.
struct CheckShared {
  unsigned long long first;  // key of the first fault
  DevicePool* pool;          // null if the head is wrong; then nothing else may be accessed
  DeviceSlot* slots;
  std::int32_t* written;
  std::uint32_t* marks;
  std::uint32_t pool_epoch;
  std::uint32_t cache_epoch;
  DevicePool* reporter;  // the pool whose record receives a fault
  DevicePool* counted;   // the pool whose readers include this op; null if the pool was not found
};

// All threads of the block must call these together, except where it says "any thread".
class Checker {
 public:
  __device__ Checker(const CacheArgs& args, CheckShared* shared, std::uint32_t* shared_marks)
      : args_(args), shared_(shared), shared_marks_(shared_marks) {}
  // Counts out an op that was refused or that has no other kernel.
  __device__ ~Checker() {
    if (passed_ && args_.followers > 0) return;
    __syncthreads();
    if (threadIdx.x == 0 && shared_->counted != nullptr) CountOut(&shared_->counted->readers, Blocks());
  }
  Checker(const Checker&) = delete;
  Checker& operator=(const Checker&) = delete;

  // Checks the pool, the spec, the generation and the epoch. After a return of false, only Verdict() may be called.
  __device__ bool Enter() {
    if (threadIdx.x == 0) {
      shared_->first = ~0ull;
      shared_->cache_epoch = *args_.epoch;
      CheckHead();
    }
    __syncthreads();
    return shared_->pool != nullptr;
  }

  // Marks slots so that duplicates can be found. `layer` and `offsets` do not belong to a slot; they are checked here
  // to save a barrier. `offsets` may be null.
  __device__ void Prepare(const std::int32_t* slots, std::int64_t count, const std::int32_t* offsets,
                          std::int64_t num_tokens, std::int32_t layer) {
    if (threadIdx.x == 0) CheckEnds(offsets, count, num_tokens, layer);
    for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      if (offsets != nullptr && offsets[i + 1] < offsets[i]) {
        Note(Stage::kOffsets, 1 + i, FaultKind::kOffsetsOrder, -1, -1, i, offsets[i], offsets[i + 1]);
      }
      if (Exists(slots[i])) shared_->marks[slots[i]] = ~0u;
    }
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      if (Exists(slots[i])) atomicMin(&shared_->marks[slots[i]], static_cast<std::uint32_t>(i));
    }
    __syncthreads();
  }

  // Any thread: whether entry i of the slots (not -1) may be used; *length is set to its length in the cache.
  __device__ bool CheckSlot(std::int64_t i, std::int32_t slot, std::int32_t* length) {
    if (!Exists(slot)) return Note(Stage::kSlots, i, FaultKind::kSlotRange, slot);
    *length = args_.lengths[slot];
    if (shared_->marks[slot] < static_cast<std::uint32_t>(i))
      return Note(Stage::kSlots, i, FaultKind::kSlotTwice, slot);
    return CheckSince(Stage::kSlots, i, slot);
  }

  // Any thread: whether the cache is at least as new as the slot's last destructive change.
  __device__ bool CheckSince(Stage stage, std::int64_t i, std::int32_t slot) {
    const std::uint32_t since = shared_->slots[slot].since;
    if (!Before(shared_->cache_epoch, since)) return true;
    return Note(stage, i, FaultKind::kSlotEpoch, slot, -1, -1, shared_->cache_epoch, since);
  }

  // Any thread: notes a fault in entry i. A thread keeps only the first of its faults. Returns false.
  __device__ bool Note(Stage stage, std::int64_t i, FaultKind kind, std::int32_t slot = -1, std::int32_t layer = -1,
                       std::int64_t index = -1, std::int64_t wanted = 0, std::int64_t have = 0) {
    const unsigned long long key = static_cast<unsigned long long>(stage) << 40 | static_cast<unsigned long long>(i);
    if (key >= key_) return false;
    key_ = key;
    kind_ = kind;
    slot_ = slot;
    layer_ = layer;
    index_ = static_cast<std::int32_t>(index);
    wanted_ = wanted;
    have_ = have;
    return false;
  }

  // Returns whether there was no fault; otherwise records the first one. The table has not been modified up to here.
  __device__ bool Verdict() {
    if (key_ != ~0ull) atomicMin(&shared_->first, key_);
    __syncthreads();
    passed_ = shared_->first == ~0ull;
    if (!passed_ && shared_->first == key_) Report();
    return passed_;
  }

  // Bumps the pool's epoch.
  __device__ std::uint32_t NextEpoch() {
    const std::uint32_t next = shared_->pool_epoch + 1;
    if (threadIdx.x == 0) shared_->pool->epoch = next;
    if (MustRaiseStaleMarks(next)) {
      for (std::int32_t slot = threadIdx.x; slot < args_.max_slots(); slot += blockDim.x) {
        RaiseStaleMark(next, &shared_->slots[slot].since);
      }
      __syncthreads();
    }
    return next;
  }

  __device__ bool Exists(std::int32_t slot) const { return slot >= 0 && slot < args_.max_slots(); }
  __device__ std::uint32_t* marks() const { return shared_->marks; }  // [max_slots]
  __device__ std::uint32_t cache_epoch() const { return shared_->cache_epoch; }
  __device__ std::int32_t num_layers() const { return args_.num_layers(); }
  __device__ DevicePool* pool() const { return shared_->pool; }
  // For CheckedBatch::readers, after Verdict() has returned true.
  __device__ std::uint32_t* readers() const { return args_.followers > 0 ? &shared_->pool->readers : nullptr; }
  __device__ DeviceSlot& slot(std::int32_t slot) const { return shared_->slots[slot]; }
  __device__ std::int32_t* written(std::int32_t slot) const {
    return shared_->written + std::int64_t{slot} * args_.num_layers();
  }
  __device__ std::int32_t WrittenInAllLayers(std::int32_t slot) const {
    const std::int32_t* const layers = written(slot);
    std::int32_t least = layers[0];
    for (std::int32_t layer = 1; layer < args_.num_layers(); ++layer) least = min(least, layers[layer]);
    return least;
  }

 private:
  __device__ std::uint32_t Blocks() const { return args_.followers > 0 ? args_.followers : 1; }

  __device__ void CheckHead() {
    // Read before the fence in EnterPool; after it, this would be another round trip to memory.
    const std::int32_t id = args_.handle[0], generation = args_.handle[1];
    const std::int32_t own = args_.own != nullptr ? *args_.own : id;
    PoolHead head;
    DevicePool* const pool = EnterPool(args_.pools, id, Blocks(), &head);
    shared_->pool = nullptr;
    shared_->counted = pool;
    shared_->reporter = pool != nullptr ? pool : &args_.pools[kMaxDevicePools];
    if (pool == nullptr) {
      Note(Stage::kHead, 0, FaultKind::kNoPool, -1, -1, -1, 0, id);
      return;
    }
    const std::uint32_t cache_epoch = shared_->cache_epoch;
    shared_->slots = head.slots;
    shared_->written = head.written;
    shared_->marks = args_.marks != nullptr ? args_.marks : head.marks;
    if (args_.spec[kSpecMaxSlots] <= kSharedMarks) shared_->marks = shared_marks_;
    shared_->pool_epoch = head.epoch;
    for (int i = kNumSpecFields - 1; i >= 0; --i) {  // in reverse, so that the smallest key is noted last
      if (head.spec[i] != args_.spec[i]) {
        Note(Stage::kHead, 1 + i, FaultKind::kSpec, -1, -1, i, args_.spec[i], head.spec[i]);
      }
    }
    if (own != id) Note(Stage::kHead, 10, FaultKind::kForeignCache, -1, -1, -1, id, own);
    if (head.open == 0) Note(Stage::kHead, 11, FaultKind::kClosed);
    if (generation != head.generation) {
      Note(Stage::kHead, 12, FaultKind::kGeneration, -1, -1, -1, generation, head.generation);
    }
    const bool stale = args_.mutates && head.allow_stale == 0 && cache_epoch != head.epoch;
    if (stale || Before(head.epoch, cache_epoch)) {
      Note(Stage::kHead, 13, FaultKind::kEpoch, -1, -1, -1, cache_epoch, head.epoch);
    }
    if (key_ == ~0ull) shared_->pool = pool;
  }

  __device__ void CheckEnds(const std::int32_t* offsets, std::int64_t count, std::int64_t num_tokens,
                            std::int32_t layer) {
    if (layer < 0 || layer >= args_.num_layers()) {
      Note(Stage::kHead, 14, FaultKind::kLayer, -1, layer, -1, layer);
    }
    if (offsets == nullptr) return;
    if (offsets[0] != 0) Note(Stage::kOffsets, 0, FaultKind::kOffsetsStart, -1, -1, -1, 0, offsets[0]);
    const std::int32_t last = offsets[count];
    if (num_tokens >= 0 && last > num_tokens) {
      Note(Stage::kOffsets, 1 + count, FaultKind::kOffsetsEnd, -1, -1, -1, last, num_tokens);
    }
  }

  // The record is read by the host: it holds the first fault since the host last took one.
  __device__ void Report() const {
    DevicePool* const pool = shared_->reporter;
    if (atomicCAS(&pool->faulted, 0u, 1u) != 0 || pool->fault == nullptr) return;
    volatile Fault* const fault = pool->fault;
    fault->kind = static_cast<std::int32_t>(kind_);
    fault->op = static_cast<std::int32_t>(args_.op);
    fault->slot = slot_;
    fault->layer = layer_;
    fault->index = index_;
    fault->wanted = wanted_;
    fault->have = have_;
    if (kind_ == FaultKind::kUnwritten && layer_ < 0) {
      constexpr std::int32_t kNoLimit = 0x7fffffff;
      const std::int32_t limit = index_ < 0 ? kNoLimit : index_;
      const WrittenRuns runs = FindWrittenRuns(written(slot_), args_.num_layers(), limit);
      fault->runs.count = runs.count;
      for (int i = 0; i < WrittenRuns::kMost; ++i) {
        fault->runs.last_layer[i] = runs.last_layer[i];
        fault->runs.tokens[i] = runs.tokens[i];
      }
    }
    __threadfence_system();
    fault->set = 1;
  }

  const CacheArgs& args_;
  CheckShared* const shared_;
  std::uint32_t* const shared_marks_;

  unsigned long long key_ = ~0ull;
  FaultKind kind_ = FaultKind::kNone;
  bool passed_ = false;
  std::int32_t slot_ = -1, layer_ = -1, index_ = -1;
  std::int64_t wanted_ = 0, have_ = 0;
};

// Copies the lengths to the output. The op then overwrites its own entries, after a barrier.
__device__ inline void CopyLengths(const CacheArgs& cache, std::int32_t* lengths) {
  if (lengths == cache.lengths) return;
  for (std::int32_t slot = threadIdx.x; slot < cache.max_slots(); slot += blockDim.x) {
    lengths[slot] = cache.lengths[slot];
  }
}

// Any thread, after the verdict: sets the slot's length to `length` and limits its written tokens to that.
__device__ inline void SetLength(Checker* checker, std::int32_t slot, std::int32_t length) {
  checker->slot(slot).length = length;
  std::int32_t* const layers = checker->written(slot);
  for (std::int32_t layer = 0; layer < checker->num_layers(); ++layer) layers[layer] = min(layers[layer], length);
}

// set_lengths for one slot: destructive if the length decreases.
__device__ inline void LowerLength(Checker* checker, std::int32_t slot, std::int32_t length, std::uint32_t epoch,
                                   std::int32_t* new_lengths) {
  if (length < new_lengths[slot]) checker->slot(slot).since = epoch;
  SetLength(checker, slot, length);
  new_lengths[slot] = length;
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_CHECKER_CUH_
