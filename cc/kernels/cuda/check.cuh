// The check of a batch, which is the first step of an op over keys and values. It writes a CheckedBatch for the kernels
// that follow on the stream.
#ifndef KVPAGE_KERNELS_CUDA_CHECK_CUH_
#define KVPAGE_KERNELS_CUDA_CHECK_CUH_

#include <cstdint>

#include "kernels/cuda/checker.cuh"
#include "kernels/cuda/plan_counts.h"

namespace kvpage::cuda {

// The slot of an inactive sequence is -1, or kWrongSequence if only its own output becomes NaN (tables). The sequence
// keeps its query tokens: their output is 0 and lse -inf, or NaN. Tokens after the last sequence are padding.
inline constexpr std::int32_t kWrongSequence = -2;

struct BatchCheckArgs {
  CacheArgs cache;
  const std::int32_t* slots;    // [num_sequences]
  const std::int32_t* offsets;  // [num_sequences + 1]
  std::int64_t num_sequences;
  std::int64_t num_tokens;
  const std::int32_t* layer;   // [1]
  const std::int32_t* window;  // [1] or null
  bool append;                 // the new tokens are about to be written; otherwise they must already have been
  std::uint32_t* new_epoch;    // append only
  CheckedBatch* checked;
  bool by_table;  // the following kernels address blocks through the table
  // Zeroed for the following kernels.
  std::int32_t* counters;
  std::int32_t num_counters;
  const PlanCounts* plan;  // checked for whether its groups still hold; null if there is no plan
};

// Called by one thread: copies the view of a layer that the following kernels use.
__device__ inline void CopyView(bool by_table, std::int32_t layer, Checker* checker, KVView* view) {
  const DevicePool* const pool = checker->pool();
  if (!by_table) {
    *view = pool->view;
    return;
  }
  const std::int32_t* const table = static_cast<const volatile DevicePool*>(pool)->table_view.table;
  if (table == nullptr) checker->Note(Stage::kHead, 15, FaultKind::kNoTable);
  __threadfence();  // the host copies the table's pointer after everything else
  *view = pool->table_view;
  view->table = table + layer * pool->table_layer_stride;
}

// Runs the check with all threads of one block; returns false if it fails. On return, all threads of the block can read
// the CheckedBatch.
__device__ inline bool CheckBatch(const BatchCheckArgs& args, CheckShared* shared, std::uint32_t* shared_marks) {
  Checker checker(args.cache, shared, shared_marks);
  const std::int32_t layer = *args.layer;
  CheckedBatch* const out = args.checked;
  for (std::int32_t i = threadIdx.x; i < args.num_counters; i += blockDim.x) args.counters[i] = 0;
  Sequence* const sequences = out->sequences();
  if (checker.Enter()) {
    checker.Prepare(args.slots, args.num_sequences, args.offsets, args.num_tokens, layer);
    const bool reads = args.cache.op != DeviceOp::kAppendKV;
    const std::int32_t window = args.window != nullptr ? *args.window : 0;
    const bool layer_exists = layer >= 0 && layer < args.cache.num_layers();
    // Done before the verdict, to overlap this access with the check.
    if (threadIdx.x == blockDim.x - 1) {
      CopyView(args.by_table, layer_exists ? layer : 0, &checker, &out->view);
      // The slots may have changed since an earlier program made the plan.
      out->groups_hold = args.plan != nullptr && args.plan->groups > 0 && args.plan->pool == args.cache.handle[0] &&
                         args.plan->run_cuts == checker.pool()->run_cuts;
    }
    for (std::int64_t s = threadIdx.x; s < args.num_sequences; s += blockDim.x) {
      const std::int32_t slot = args.slots[s], begin = args.offsets[s];
      const std::int64_t count = std::int64_t{args.offsets[s + 1]} - begin;  // offsets may be invalid
      Sequence sequence;
      sequence.slot = -1;
      sequence.query_begin = begin;
      sequence.query_length = static_cast<std::int32_t>(count);
      std::int32_t length = 0;
      if (slot != -1 && checker.CheckSlot(s, slot, &length)) {
        if (length < 0) {
          checker.Note(Stage::kSlots, s, FaultKind::kSlotFree, slot);
        } else if (count > 0) {
          sequence.slot = slot;
          sequence.position = length;
          const std::int64_t end = length + count;
          const DeviceSlot row = checker.slot(slot);
          const std::int32_t room = row.released != 0 ? 0 : row.room;
          const std::int32_t written = layer_exists ? checker.written(slot)[layer] : 0;
          if (end > args.cache.max_seq_len()) {
            checker.Note(Stage::kLimits, s, FaultKind::kMaxSeqLen, slot, -1, -1, end);
          } else if (end > room) {
            checker.Note(Stage::kLimits, s, FaultKind::kUnmapped, slot, -1, -1, end, room);
          } else if (args.append && length < row.shared) {
            checker.Note(Stage::kLimits, s, FaultKind::kShared, slot, -1, -1, length, row.shared);
          } else if (const auto first = static_cast<std::int32_t>(reads ? sequence.FirstVisible(window) : length);
                     first < row.dropped) {
            checker.Note(Stage::kLimits, s, FaultKind::kDropped, slot, -1, -1, first, row.dropped);
          } else if (args.append && length > written) {
            // Otherwise the context before the new tokens would contain data of an earlier owner of the memory.
            checker.Note(Stage::kLimits, s, FaultKind::kLength, slot, layer, -1, length, written);
          } else if (args.append && length < written && checker.pool()->debug != 0) {
            // The flag is read only here: programs that advance after each step never reach it.
            checker.Note(Stage::kLimits, s, FaultKind::kWrittenTwice, slot, layer, -1, length);
          } else if (!args.append && end > written) {
            checker.Note(Stage::kLimits, s, FaultKind::kUnwritten, slot, layer, -1, end, written);
          }
        }
      }
      sequences[s] = sequence;
    }
  }
  const bool ok = checker.Verdict();
  if (ok) {
    // Set already here: kernels that read these tokens come after their append on the stream.
    for (std::int64_t s = threadIdx.x; args.append && s < args.num_sequences; s += blockDim.x) {
      const Sequence& sequence = sequences[s];
      if (sequence.slot < 0) continue;
      atomicMax(&checker.written(sequence.slot)[layer], static_cast<std::int32_t>(sequence.end()));
    }
    const std::uint32_t next = args.append ? checker.NextEpoch() : 0;
    if (threadIdx.x == 0 && args.append) *args.new_epoch = next;
  } else if (threadIdx.x == 0 && args.append) {
    *args.new_epoch = checker.cache_epoch();
  }
  if (threadIdx.x == 0) {
    out->ok = ok ? 1 : 0;
    out->readers = ok ? checker.readers() : nullptr;
    out->layer = layer;
    out->num_sequences = static_cast<std::int32_t>(args.num_sequences);
    out->sliding_window = args.window != nullptr ? *args.window : 0;
  }
  __syncthreads();
  return ok;
}

// The arguments for checking `batch` in one block of kCheckThreads with CheckSharedBytes(cache) of dynamic shared
// memory. Use LaunchBatchCheck, or call CheckBatch in a kernel that continues with the result. `followers`: number of
// blocks of the op's last kernel, each with a CountedBlock; 0 if no kernel follows the check.
inline BatchCheckArgs ToArgs(const CacheOperands& cache, const BatchOperands& batch, const std::int32_t* layer,
                             const std::int32_t* window, bool append, std::uint32_t* new_epoch, void* checked,
                             std::int64_t followers) {
  CacheArgs cache_args = ToArgs(cache, append, nullptr, followers);
  if (cache.spec[kSpecMaxSlots] > kSharedMarks) {
    cache_args.marks = reinterpret_cast<std::uint32_t*>(static_cast<char*>(checked) + MarksOffset(batch.num_sequences));
  }
  BatchCheckArgs args = {};
  args.cache = cache_args;
  args.slots = batch.slots;
  args.offsets = batch.offsets;
  args.num_sequences = batch.num_sequences;
  args.num_tokens = batch.num_tokens;
  args.layer = layer;
  args.window = window;
  args.append = append;
  args.new_epoch = new_epoch;
  args.checked = static_cast<CheckedBatch*>(checked);
  return args;
}

// Launches the check on its own (slots.cu).
Status LaunchBatchCheck(const CacheOperands& cache, const BatchCheckArgs& args, Stream stream);

// Returns `launched`, the status of launching the kernels after a check. If one of them could not be launched, counts
// the op out in their place.
Status CountOutUnless(const Status& launched, void* checked, std::int64_t followers, Stream stream);

// Writes the sequences for attention over plain page arrays as a CheckedBatch (tables.cu). A sequence with an invalid
// length or table becomes a kWrongSequence; invalid offsets fail the whole batch.
Status LaunchTableCheck(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const std::int32_t* window, void* checked, Stream stream);

// Writes the new keys and values of a batch whose check ran earlier on the stream (append.cu). `last`: no other kernel
// of the op follows.
Status LaunchAppend(const CheckedBatch* checked, std::int64_t num_tokens, const AppendOperands& append, DType storage,
                    bool last, Stream stream);

// Any thread: the sequence of the checked batch that contains `token`, active or not; -1 for padding.
__device__ inline std::int32_t SequenceOf(const CheckedBatch& checked, std::int64_t token) {
  const Sequence* const sequences = checked.sequences();
  std::int32_t low = 0,
               high = checked.num_sequences;  // the last sequence that begins at or before the token is in [low, high)
  if (token < high && sequences[token].query_begin == token && sequences[token].query_length == 1) {
    return static_cast<std::int32_t>(token);  // decode: one token per sequence
  }
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    if (sequences[middle].query_begin <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (high <= low) return -1;
  const Sequence& sequence = sequences[low];
  return token >= sequence.query_begin && token < sequence.query_begin + sequence.query_length ? low : -1;
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_CHECK_CUH_
