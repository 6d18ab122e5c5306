// edit_slots: the single op that host calls (acquire, release, ...) queue, like Pool::EditSlots (cache/edit_ops.cc) on
// CPU. One block checks both lists and makes the edits; the copies, if there are any, follow in another launch.
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/copy_tokens.cuh"

namespace kvpage::cuda {
namespace {

constexpr std::uint32_t kUnmarked = ~0u;

struct EditArgs {
  CacheArgs cache;
  EditList list;
  std::uint32_t* new_epoch;
  std::int32_t* new_lengths;
  CheckedBatch* checked;  // for the copies; null if there are none
};

// The state of a slot after the edits.
struct EditedSlot {
  std::int32_t length;
  std::int32_t room;
  std::int32_t written;  // in every layer
  std::int32_t limit;    // at most this many tokens count as written; -1 if there is no limit
  std::int32_t shared;   // positions below this may not be written
  std::int32_t dropped;  // positions below this are gone
};

class Editor {
 public:
  __device__ Editor(const EditArgs& args, Checker* checker) : args_(args), checker_(*checker) {}

  // Marks edited slots, so that duplicates can be found and copies can look up the edits of their slots.
  __device__ void Prepare() {
    std::uint32_t* const marks = checker_.marks();
    const auto clear = [&](std::int32_t slot) {
      if (checker_.Exists(slot)) marks[slot] = kUnmarked;
    };
    for (std::int64_t i = threadIdx.x; i < args_.list.num_edits; i += blockDim.x) clear(args_.list.edits[i].slot);
    ForCopies([&](std::int64_t, const TokenCopy& copy) {
      clear(copy.source);
      clear(copy.target);
    });
    for (std::int64_t i = threadIdx.x; i < args_.list.num_edits; i += blockDim.x) clear(args_.list.edits[i].donor);
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < args_.list.num_edits; i += blockDim.x) {
      const std::int32_t slot = args_.list.edits[i].slot;
      if (checker_.Exists(slot)) atomicMin(&marks[slot], static_cast<std::uint32_t>(i));
    }
    __syncthreads();
  }

  // Any thread: whether edit i is valid.
  __device__ bool CheckEdit(std::int64_t i) {
    const SlotEdit edit = args_.list.edits[i];
    std::int32_t length = 0;
    if (!checker_.CheckSlot(i, edit.slot, &length)) return false;
    const auto wrong = [&](FaultKind kind, std::int64_t wanted = 0, std::int64_t have = 0) {
      return checker_.Note(Stage::kSlots, i, kind, edit.slot, -1, -1, wanted, have);
    };
    switch (static_cast<SlotOpcode>(edit.opcode)) {
      case SlotOpcode::kOccupy:
        return length < 0 || wrong(FaultKind::kSlotTaken);
      case SlotOpcode::kFound:
      case SlotOpcode::kSwapIn: {
        if (length >= 0) return wrong(FaultKind::kSlotTaken);
        const std::int32_t room = checker_.slot(edit.slot).room;
        if (edit.length >= 0 && edit.length <= room) return true;
        return checker_.Note(Stage::kForks, i, FaultKind::kUnmapped, edit.slot, -1, -1, edit.length, room);
      }
      case SlotOpcode::kVacate:
        return length >= 0 || wrong(FaultKind::kSlotFree);
      case SlotOpcode::kFork:
        return length < 0 ? CheckFork(i, edit) : wrong(FaultKind::kSlotTaken);
      case SlotOpcode::kSetLength:
      case SlotOpcode::kTruncate:
        if (length < 0) return wrong(FaultKind::kSlotFree);
        if (edit.length < 0 || edit.length > length) return wrong(FaultKind::kRaise, edit.length, length);
        if (const std::int32_t dropped = checker_.slot(edit.slot).dropped; edit.length < dropped) {
          return wrong(FaultKind::kBelowDropped, edit.length, dropped);
        }
        if (const std::int32_t written = checker_.WrittenInAllLayers(edit.slot); edit.length > written) {
          return wrong(FaultKind::kUnwritten, edit.length, written);
        }
        return true;
      case SlotOpcode::kDrop:
        if (length < 0) return wrong(FaultKind::kSlotFree);
        return edit.length <= length || wrong(FaultKind::kDropBeyond, edit.length, length);
    }
    return wrong(FaultKind::kOpcode, edit.opcode);
  }

  // Any thread: whether the slot of edit i can fork from the donor. Uses the marks of Prepare.
  __device__ bool CheckFork(std::int64_t i, const SlotEdit& edit) {
    const auto wrong = [&](FaultKind kind, std::int32_t slot, std::int64_t wanted = 0, std::int64_t have = 0) {
      return checker_.Note(Stage::kForks, i, kind, slot, -1, -1, wanted, have);
    };
    if (!checker_.Exists(edit.donor)) return wrong(FaultKind::kSlotRange, edit.donor);
    if (checker_.marks()[edit.donor] != kUnmarked) return wrong(FaultKind::kDonorEdited, edit.slot, 0, edit.donor);
    if (!checker_.CheckSince(Stage::kForks, i, edit.donor)) return false;
    if (args_.cache.lengths[edit.donor] < 0) return wrong(FaultKind::kSlotFree, edit.donor);
    const std::int32_t room = checker_.slot(edit.slot).room, written = checker_.WrittenInAllLayers(edit.donor);
    if (edit.length < 0 || edit.length > room) return wrong(FaultKind::kUnmapped, edit.slot, edit.length, room);
    if (edit.length > written) return wrong(FaultKind::kUnwritten, edit.donor, edit.length, written);
    return true;
  }

  // Any thread: whether copy i is valid after the edits. Uses the marks of Prepare.
  __device__ bool CheckCopy(std::int64_t i, const TokenCopy& copy) {
    const auto wrong = [&](FaultKind kind, std::int32_t slot, std::int64_t wanted = 0, std::int64_t have = 0) {
      return checker_.Note(Stage::kCopies, i, kind, slot, -1, -1, wanted, have);
    };
    const auto unwritten = [&](std::int32_t slot, const EditedSlot& row, std::int64_t wanted) {
      return checker_.Note(Stage::kCopies, i, FaultKind::kUnwritten, slot, -1, row.limit, wanted, row.written);
    };
    if (!checker_.Exists(copy.source)) return wrong(FaultKind::kSlotRange, copy.source);
    if (!checker_.Exists(copy.target)) return wrong(FaultKind::kSlotRange, copy.target);
    const EditedSlot source = After(copy.source), target = After(copy.target);
    if (!checker_.CheckSince(Stage::kCopies, i, copy.source)) return false;
    if (source.length < 0) return wrong(FaultKind::kSlotFree, copy.source);
    if (!checker_.CheckSince(Stage::kCopies, i, copy.target)) return false;
    if (target.length < 0) return wrong(FaultKind::kSlotFree, copy.target);
    if (copy.first < 0 || copy.count < 0) return wrong(FaultKind::kCopyTokens, copy.target, copy.first, copy.count);
    const std::int64_t end = std::int64_t{copy.first} + copy.count;
    if (end > args_.cache.max_seq_len()) return wrong(FaultKind::kMaxSeqLen, copy.target, end);
    if (end > source.room) return wrong(FaultKind::kUnmapped, copy.source, end, source.room);
    if (end > target.room) return wrong(FaultKind::kUnmapped, copy.target, end, target.room);
    if (copy.count > 0 && copy.first < source.dropped) {
      return wrong(FaultKind::kDropped, copy.source, copy.first, source.dropped);
    }
    if (copy.count > 0 && copy.first < target.dropped) {
      return wrong(FaultKind::kDropped, copy.target, copy.first, target.dropped);
    }
    if (copy.count > 0 && copy.first < target.shared) {
      return wrong(FaultKind::kShared, copy.target, copy.first, target.shared);
    }
    if (end > source.written) return unwritten(copy.source, source, end);
    // A gap would expose data of an earlier owner of the memory.
    if (copy.first > target.written) return unwritten(copy.target, target, copy.first);
    return true;
  }

  // Checks that the result of the copies does not depend on their order.
  __device__ void CheckTargets() {
    std::uint32_t* const marks = checker_.marks();
    __syncthreads();  // the edits' marks have been read
    ForCopies([&](std::int64_t, const TokenCopy& copy) {
      if (checker_.Exists(copy.source)) marks[copy.source] = kUnmarked;
      if (checker_.Exists(copy.target)) marks[copy.target] = kUnmarked;
    });
    __syncthreads();
    ForCopies([&](std::int64_t i, const TokenCopy& copy) {
      if (checker_.Exists(copy.target)) atomicMin(&marks[copy.target], static_cast<std::uint32_t>(i));
    });
    __syncthreads();
    ForCopies([&](std::int64_t i, const TokenCopy& copy) {
      if (checker_.Exists(copy.target) && marks[copy.target] < static_cast<std::uint32_t>(i)) {
        checker_.Note(Stage::kTargets, i, FaultKind::kCopyTwice, copy.target);
      }
      if (checker_.Exists(copy.source) && marks[copy.source] != kUnmarked) {
        checker_.Note(Stage::kSources, i, FaultKind::kCopyChain, copy.source);
      }
    });
  }

  // Any thread, after the verdict.
  __device__ void Apply(const SlotEdit& edit, std::uint32_t epoch) {
    if (Is(edit, SlotOpcode::kSetLength) || Is(edit, SlotOpcode::kTruncate)) {
      std::int32_t& shared = checker_.slot(edit.slot).shared;
      if (Is(edit, SlotOpcode::kTruncate)) shared = min(shared, WholeBlocks(edit.length));
      return LowerLength(&checker_, edit.slot, edit.length, epoch, args_.new_lengths);
    }
    if (Is(edit, SlotOpcode::kDrop)) {
      std::int32_t& dropped = checker_.slot(edit.slot).dropped;
      dropped = max(dropped, edit.length);
      return;
    }
    const bool vacate = Is(edit, SlotOpcode::kVacate);
    const std::int32_t written = vacate ? checker_.WrittenInAllLayers(edit.slot) : 0;
    checker_.slot(edit.slot).since = epoch;
    checker_.slot(edit.slot).released = vacate ? 1 : 0;
    checker_.slot(edit.slot).shared = checker_.slot(edit.slot).dropped = 0;
    SetLength(&checker_, edit.slot, 0);
    args_.new_lengths[edit.slot] = vacate ? -1 : 0;
    if (Is(edit, SlotOpcode::kFork)) {
      checker_.slot(edit.slot).length = args_.new_lengths[edit.slot] = edit.length;
      RaiseWritten(edit.slot, WholeBlocks(edit.length));
      // Takes effect only now, because programs queued earlier may still have to write these tokens. Several edits may
      // have the same donor.
      checker_.slot(edit.slot).shared = WholeBlocks(edit.length);
      atomicMax(&checker_.slot(edit.donor).shared, WholeBlocks(edit.length));
    }
    if (Restores(edit)) {
      checker_.slot(edit.slot).length = args_.new_lengths[edit.slot] = edit.length;
      checker_.slot(edit.slot).shared = SharedOf(edit);
      RaiseWritten(edit.slot, edit.length);
    }
    if (!vacate) return;
    __threadfence_system();  // the host may reuse the slot at once
    checker_.pool()->vacated[edit.slot] = static_cast<std::uint32_t>(written) + 1;
  }

  // The targets count as written already here: kernels that read these tokens come after their copy on the stream.
  __device__ void MarkCopied(const TokenCopy& copy, std::uint32_t epoch) {
    checker_.slot(copy.target).since = epoch;
    RaiseWritten(copy.target, copy.first + copy.count);
  }

  // Calls fn(i, copy) for this thread's share of the copies.
  template <class Fn>
  __device__ void ForCopies(Fn&& fn) {
    for (std::int64_t i = threadIdx.x; i < args_.list.num_copies; i += blockDim.x) {
      const TokenCopy copy = args_.list.copies[i];
      if (copy.source != -1) fn(i, copy);
    }
  }

 private:
  __device__ static bool Is(const SlotEdit& edit, SlotOpcode opcode) {
    return edit.opcode == static_cast<std::int32_t>(opcode);
  }

  // Whether a free slot becomes a sequence whose tokens are already in its memory.
  __device__ static bool Restores(const SlotEdit& edit) {
    return Is(edit, SlotOpcode::kFound) || Is(edit, SlotOpcode::kSwapIn);
  }
  // How much of the beginning of such a sequence must not be written. For a swapped sequence the host decides.
  __device__ static std::int32_t SharedOf(const SlotEdit& edit) {
    return Is(edit, SlotOpcode::kSwapIn) ? min(max(edit.donor, 0), edit.length) : edit.length;
  }

  // The number of tokens in full blocks.
  __device__ std::int32_t WholeBlocks(std::int32_t tokens) const {
    return tokens - tokens % static_cast<std::int32_t>(args_.cache.spec[kSpecBlockTokens]);
  }

  __device__ void RaiseWritten(std::int32_t slot, std::int32_t end) {
    std::int32_t* const layers = checker_.written(slot);
    for (std::int32_t layer = 0; layer < checker_.num_layers(); ++layer) layers[layer] = max(layers[layer], end);
  }

  __device__ EditedSlot After(std::int32_t slot) const {
    const DeviceSlot& row = checker_.slot(slot);
    EditedSlot after = {args_.cache.lengths[slot],
                        row.released != 0 ? 0 : row.room,
                        checker_.WrittenInAllLayers(slot),
                        -1,
                        row.shared,
                        row.dropped};
    const std::uint32_t mark = checker_.marks()[slot];
    if (mark == kUnmarked) return after;
    const SlotEdit edit = args_.list.edits[mark];
    if (Is(edit, SlotOpcode::kDrop)) {
      after.dropped = max(after.dropped, edit.length);
      return after;
    }
    const bool fork = Is(edit, SlotOpcode::kFork), occupy = Is(edit, SlotOpcode::kOccupy);
    const bool found = Restores(edit);
    after.length = occupy ? 0 : Is(edit, SlotOpcode::kVacate) ? -1 : edit.length;
    if (occupy || fork || found) after.room = row.room;
    after.written = fork ? WholeBlocks(edit.length) : found ? edit.length : min(after.written, after.length);
    after.limit = after.length;
    if (occupy || fork || found) after.dropped = 0;
    if (occupy || fork || found) after.shared = occupy ? 0 : found ? SharedOf(edit) : after.written;
    if (Is(edit, SlotOpcode::kTruncate)) after.shared = min(after.shared, WholeBlocks(edit.length));
    return after;
  }

  const EditArgs& args_;
  Checker& checker_;
};

__global__ void __launch_bounds__(kCheckThreads) EditKernel(const __grid_constant__ EditArgs args) {
  KVPAGE_SHARED(CheckShared, shared);
  KVPAGE_DYNAMIC_SHARED(marks);
  LetNextKernelStart();
  Checker checker(args.cache, &shared, reinterpret_cast<std::uint32_t*>(marks));
  Editor editor(args, &checker);
  if (checker.Enter()) {
    editor.Prepare();
    for (std::int64_t i = threadIdx.x; i < args.list.num_edits; i += blockDim.x) {
      if (args.list.edits[i].slot != -1) editor.CheckEdit(i);
    }
    if (args.list.num_copies > 0) {
      editor.ForCopies([&](std::int64_t i, const TokenCopy& copy) { editor.CheckCopy(i, copy); });
      editor.CheckTargets();
    }
  }
  const bool ok = checker.Verdict();
  const std::uint32_t epoch = ok ? checker.NextEpoch() : checker.cache_epoch();
  if (threadIdx.x == 0) {
    *args.new_epoch = epoch;
    if (args.checked != nullptr) {
      args.checked->ok = ok ? 1 : 0;
      args.checked->readers = ok ? checker.readers() : nullptr;
      if (ok) args.checked->view = checker.pool()->view;
    }
  }
  CopyLengths(args.cache, args.new_lengths);
  __syncthreads();
  if (!ok) return;
  for (std::int64_t i = threadIdx.x; i < args.list.num_edits; i += blockDim.x) {
    if (args.list.edits[i].slot != -1) editor.Apply(args.list.edits[i], epoch);
  }
  if (args.list.num_copies == 0) return;
  __syncthreads();
  editor.ForCopies([&](std::int64_t, const TokenCopy& copy) { editor.MarkCopied(copy, epoch); });
}

}  // namespace

Status EditSlots(const CacheOperands& cache, const std::int32_t* own, const EditList& list, std::uint32_t* new_epoch,
                 std::int32_t* new_lengths, void* checked, Stream stream) {
  auto* const verdict = list.num_copies > 0 ? static_cast<CheckedBatch*>(checked) : nullptr;
  const std::int64_t blocks = NumCopyBlocks(cache, list);
  const EditArgs args = {ToArgs(cache, true, own, blocks), list, new_epoch, new_lengths, verdict};
  KVPAGE_RETURN_IF_ERROR(Launch<EditKernel>(OpName(cache.op), OneBlock(cache), stream, args));
  if (blocks == 0) return {};
  return CountOutUnless(LaunchCopies(cache, list, verdict, stream), checked, blocks, stream);
}

}  // namespace kvpage::cuda
