// Slot table ops that programs call: advance, set_lengths and the device's part of map_slots; also the check of ops on
// keys and values. Each runs in one block: it reads a few numbers per slot, and its cost is round trips to memory.
#include "kernels/cuda/check.cuh"

namespace kvpage::cuda {
namespace {

__global__ void __launch_bounds__(kCheckThreads) BatchCheckKernel(const __grid_constant__ BatchCheckArgs args) {
  KVPAGE_SHARED(CheckShared, shared);
  KVPAGE_DYNAMIC_SHARED(marks);
  LetNextKernelStart();
  CheckBatch(args, &shared, reinterpret_cast<std::uint32_t*>(marks));
}

// Counts out in place of the blocks of a kernel that was never launched.
__global__ void CountOutKernel(const CheckedBatch* checked, std::uint32_t blocks) {
  if (checked->readers != nullptr) CountOut(checked->readers, blocks);
}

struct AdvanceArgs {
  CacheArgs cache;
  const std::int32_t* slots;
  const std::int32_t* offsets;
  std::int64_t num_sequences;
  std::int64_t num_tokens;
  std::uint32_t* new_epoch;
  std::int32_t* new_lengths;
};

__global__ void __launch_bounds__(kCheckThreads) AdvanceKernel(const __grid_constant__ AdvanceArgs args) {
  KVPAGE_SHARED(CheckShared, shared);
  KVPAGE_DYNAMIC_SHARED(marks);
  Checker checker(args.cache, &shared, reinterpret_cast<std::uint32_t*>(marks));
  if (checker.Enter()) {
    checker.Prepare(args.slots, args.num_sequences, args.offsets, args.num_tokens, 0);
    for (std::int64_t s = threadIdx.x; s < args.num_sequences; s += blockDim.x) {
      const std::int32_t slot = args.slots[s];
      const std::int64_t count = std::int64_t{args.offsets[s + 1]} - args.offsets[s];  // offsets may be invalid
      std::int32_t length = 0;
      if (slot == -1 || !checker.CheckSlot(s, slot, &length)) continue;
      if (length < 0) checker.Note(Stage::kSlots, s, FaultKind::kSlotFree, slot);
      if (length < 0 || count <= 0) continue;
      const std::int32_t written = checker.WrittenInAllLayers(slot);
      // Otherwise a reader would find data of an earlier owner of the memory.
      const std::int64_t end = length + count;
      if (end > written) checker.Note(Stage::kLimits, s, FaultKind::kUnwritten, slot, -1, -1, end, written);
    }
  }
  const bool ok = checker.Verdict();
  const std::uint32_t epoch = ok ? checker.NextEpoch() : checker.cache_epoch();
  if (threadIdx.x == 0) *args.new_epoch = epoch;
  CopyLengths(args.cache, args.new_lengths);
  __syncthreads();
  if (!ok) return;
  for (std::int64_t s = threadIdx.x; s < args.num_sequences; s += blockDim.x) {
    const std::int32_t slot = args.slots[s], count = args.offsets[s + 1] - args.offsets[s];
    if (slot == -1 || count == 0) continue;
    const std::int32_t end = args.new_lengths[slot] + count;
    args.new_lengths[slot] = checker.slot(slot).length = end;
  }
}

enum class Change { kSetLengths, kMap };

struct ChangeArgs {
  CacheArgs cache;
  const std::int32_t* slots;
  const std::int32_t* values;  // new lengths, or tokens to map
  std::int64_t count;
  std::uint32_t* new_epoch;
  std::int32_t* new_lengths;
  std::int32_t* verdict;
};

template <Change change>
__device__ void CheckEntry(Checker* checker, const ChangeArgs& args, std::int64_t i, std::int32_t slot) {
  std::int32_t length = 0;
  if (!checker->CheckSlot(i, slot, &length)) return;
  if (length < 0) {
    checker->Note(Stage::kSlots, i, FaultKind::kSlotFree, slot);
    return;
  }
  const std::int32_t value = args.values[i];
  if (change == Change::kSetLengths) {
    if (value < 0 || value > length) {
      checker->Note(Stage::kSlots, i, FaultKind::kRaise, slot, -1, -1, value, length);
    } else if (const std::int32_t shared = checker->slot(slot).shared; value < min(shared, length)) {
      checker->Note(Stage::kSlots, i, FaultKind::kBelowShared, slot, -1, -1, value, shared);
    } else if (const std::int32_t dropped = checker->slot(slot).dropped; value < dropped) {
      checker->Note(Stage::kSlots, i, FaultKind::kBelowDropped, slot, -1, -1, value, dropped);
    } else if (const std::int32_t written = checker->WrittenInAllLayers(slot); value > written) {
      checker->Note(Stage::kSlots, i, FaultKind::kUnwritten, slot, -1, -1, value, written);
    }
    return;
  }
  if (checker->slot(slot).released != 0) {
    checker->Note(Stage::kSlots, i, FaultKind::kSlotFree, slot);
    return;
  }
  // More than max_seq_len is not a fault: the host's part returns ok=false.
  if (value < 0) {
    checker->Note(Stage::kSlots, i, FaultKind::kMaxSeqLen, slot, -1, -1, value);
  }
}

template <Change change>
__global__ void __launch_bounds__(kCheckThreads) ChangeKernel(const __grid_constant__ ChangeArgs args) {
  KVPAGE_SHARED(CheckShared, shared);
  KVPAGE_DYNAMIC_SHARED(marks);
  Checker checker(args.cache, &shared, reinterpret_cast<std::uint32_t*>(marks));
  if (checker.Enter()) {
    checker.Prepare(args.slots, args.count, nullptr, -1, 0);
    for (std::int64_t i = threadIdx.x; i < args.count; i += blockDim.x) {
      if (args.slots[i] != -1) CheckEntry<change>(&checker, args, i, args.slots[i]);
    }
  }
  const bool ok = checker.Verdict();
  const std::uint32_t epoch = ok ? checker.NextEpoch() : checker.cache_epoch();
  if (threadIdx.x == 0) {
    *args.new_epoch = epoch;
    if (change == Change::kMap) *args.verdict = ok ? 1 : 0;
  }
  if (change == Change::kMap) return;
  CopyLengths(args.cache, args.new_lengths);
  __syncthreads();
  if (!ok) return;
  for (std::int64_t i = threadIdx.x; i < args.count; i += blockDim.x) {
    if (args.slots[i] != -1) LowerLength(&checker, args.slots[i], args.values[i], epoch, args.new_lengths);
  }
}

}  // namespace

Status LaunchBatchCheck(const CacheOperands& cache, const BatchCheckArgs& args, Stream stream) {
  return Launch<BatchCheckKernel>("check", OneBlock(cache), stream, args);
}

Status CountOutUnless(const Status& launched, void* checked, std::int64_t followers, Stream stream) {
  if (launched.ok() || followers == 0) return launched;
  // If this fails too, the host's wait times out, and it does not touch the pool's memory.
  static_cast<void>(Launch<CountOutKernel>("count_out", LaunchShape{1, 1, 0, false}, stream,
                                           static_cast<const CheckedBatch*>(checked),
                                           static_cast<std::uint32_t>(followers)));
  return launched;
}

Status Advance(const CacheOperands& cache, const BatchOperands& batch, std::uint32_t* new_epoch,
               std::int32_t* new_lengths, Stream stream) {
  const AdvanceArgs args = {ToArgs(cache, true), batch.slots, batch.offsets, batch.num_sequences,
                            batch.num_tokens,    new_epoch,   new_lengths};
  return Launch<AdvanceKernel>("advance", OneBlock(cache), stream, args);
}

Status SetLengths(const CacheOperands& cache, const std::int32_t* slots, const std::int32_t* values, std::int64_t count,
                  std::uint32_t* new_epoch, std::int32_t* new_lengths, Stream stream) {
  const ChangeArgs args = {ToArgs(cache, true), slots, values, count, new_epoch, new_lengths, nullptr};
  return Launch<ChangeKernel<Change::kSetLengths>>("set_lengths", OneBlock(cache), stream, args);
}

Status CheckMapSlots(const CacheOperands& cache, const std::int32_t* slots, const std::int32_t* tokens,
                     std::int64_t count, std::uint32_t* new_epoch, std::int32_t* verdict, Stream stream) {
  const ChangeArgs args = {ToArgs(cache, true), slots, tokens, count, new_epoch, nullptr, verdict};
  return Launch<ChangeKernel<Change::kMap>>("map_slots", OneBlock(cache), stream, args);
}

}  // namespace kvpage::cuda
