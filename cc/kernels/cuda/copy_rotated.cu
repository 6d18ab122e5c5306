// copy_rotated: copies segments of sequences to the end of others, at other positions, like Pool::CopyRotated
// (cache/reuse.cc) on CPU. One block checks the list and extends the targets; the copies follow in another launch.
// Values are copied bit by bit, keys are rotated in float32 as on CPU, without fused products.
#include "base/cosine.h"
#include "base/segment_copies.h"
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/quantize.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks per copy and layer, which share its tokens: their number is not known at launch.
constexpr int kPieces = 16;
constexpr std::uint32_t kUnmarked = ~0u;

struct ReuseArgs {
  CacheArgs cache;
  SegmentList list;
  std::uint32_t* new_epoch;
  std::int32_t* new_lengths;
  CheckedBatch* checked;
};

// Calls fn(i, copy) for this thread's share of the copies.
template <class Fn>
__device__ void ForCopies(const SegmentList& list, Fn&& fn) {
  for (std::int64_t i = threadIdx.x; i < list.num_copies; i += blockDim.x) {
    const SegmentCopy copy = list.copies[i];
    if (copy.source != -1) fn(i, copy);
  }
}

// Any thread: whether copy i is valid.
__device__ bool CheckCopy(const CacheArgs& cache, Checker* checker, std::int64_t i, const SegmentCopy& copy) {
  const auto wrong = [&](FaultKind kind, std::int32_t slot, std::int64_t wanted = 0, std::int64_t have = 0) {
    return checker->Note(Stage::kCopies, i, kind, slot, -1, -1, wanted, have);
  };
  const std::int32_t slots[] = {copy.source, copy.target};
  for (const std::int32_t slot : slots) {
    if (!checker->Exists(slot)) return wrong(FaultKind::kSlotRange, slot);
  }
  for (const std::int32_t slot : slots) {
    if (!checker->CheckSince(Stage::kCopies, i, slot)) return false;
    if (cache.lengths[slot] < 0) return wrong(FaultKind::kSlotFree, slot);
  }
  if (copy.begin < 0 || copy.count < 0) return wrong(FaultKind::kCopyTokens, copy.target, copy.begin, copy.count);
  const DeviceSlot source = checker->slot(copy.source), target = checker->slot(copy.target);
  const std::int32_t length = cache.lengths[copy.target];
  const std::int64_t end = std::int64_t{length} + copy.count;
  if (end > cache.max_seq_len()) return wrong(FaultKind::kMaxSeqLen, copy.target, end);
  const std::int32_t have = source.released != 0 ? 0 : source.room, room = target.released != 0 ? 0 : target.room;
  if (copy.end() > have) return wrong(FaultKind::kUnmapped, copy.source, copy.end(), have);
  if (end > room) return wrong(FaultKind::kUnmapped, copy.target, end, room);
  if (copy.count > 0 && copy.begin < source.dropped) {
    return wrong(FaultKind::kDropped, copy.source, copy.begin, source.dropped);
  }
  if (copy.count > 0 && length < target.dropped) return wrong(FaultKind::kDropped, copy.target, length, target.dropped);
  if (copy.count > 0 && length < target.shared) return wrong(FaultKind::kShared, copy.target, length, target.shared);
  const std::int32_t written = checker->WrittenInAllLayers(copy.source);
  if (copy.end() > written) return wrong(FaultKind::kUnwritten, copy.source, copy.end(), written);
  // A gap would expose data of an earlier owner of the memory.
  const std::int32_t before = checker->WrittenInAllLayers(copy.target);
  if (length > before) return wrong(FaultKind::kUnwritten, copy.target, length, before);
  // The prefix index covers committed tokens: it would serve this segment as if it had been computed.
  if (copy.committed > length) return wrong(FaultKind::kCommittedAhead, copy.target, copy.committed, length);
  return true;
}

// All threads: checks that each target is used by one copy only, and is not the source of any copy.
__device__ void CheckTargets(const SegmentList& list, Checker* checker) {
  std::uint32_t* const marks = checker->marks();
  ForCopies(list, [&](std::int64_t, const SegmentCopy& copy) {
    if (checker->Exists(copy.source)) marks[copy.source] = kUnmarked;
    if (checker->Exists(copy.target)) marks[copy.target] = kUnmarked;
  });
  __syncthreads();
  ForCopies(list, [&](std::int64_t i, const SegmentCopy& copy) {
    if (checker->Exists(copy.target)) atomicMin(&marks[copy.target], static_cast<std::uint32_t>(i));
  });
  __syncthreads();
  ForCopies(list, [&](std::int64_t i, const SegmentCopy& copy) {
    if (checker->Exists(copy.target) && marks[copy.target] < static_cast<std::uint32_t>(i)) {
      checker->Note(Stage::kTargets, i, FaultKind::kCopyTwice, copy.target);
    }
    if (checker->Exists(copy.source) && marks[copy.source] != kUnmarked) {
      checker->Note(Stage::kSources, i, FaultKind::kCopyChain, copy.source);
    }
  });
}

__global__ void __launch_bounds__(kCheckThreads) ReuseKernel(const __grid_constant__ ReuseArgs args) {
  KVPAGE_SHARED(CheckShared, shared);
  KVPAGE_DYNAMIC_SHARED(marks);
  LetNextKernelStart();
  Checker checker(args.cache, &shared, reinterpret_cast<std::uint32_t*>(marks));
  if (checker.Enter()) {
    ForCopies(args.list, [&](std::int64_t i, const SegmentCopy& copy) { CheckCopy(args.cache, &checker, i, copy); });
    CheckTargets(args.list, &checker);
  }
  const bool ok = checker.Verdict();
  const std::uint32_t epoch = ok ? checker.NextEpoch() : checker.cache_epoch();
  if (threadIdx.x == 0) {
    *args.new_epoch = epoch;
    args.checked->ok = ok ? 1 : 0;
    args.checked->readers = ok ? checker.readers() : nullptr;
    if (ok) args.checked->view = checker.pool()->view;
  }
  CopyLengths(args.cache, args.new_lengths);
  __syncthreads();
  if (!ok) return;
  ForCopies(args.list, [&](std::int64_t, const SegmentCopy& copy) {
    const std::int32_t end = args.new_lengths[copy.target] + copy.count;
    args.new_lengths[copy.target] = checker.slot(copy.target).length = end;
    // Set already here: kernels that read these tokens come after their copy on the stream.
    std::int32_t* const layers = checker.written(copy.target);
    for (std::int32_t layer = 0; layer < checker.num_layers(); ++layer) layers[layer] = max(layers[layer], end);
  });
}

struct RotateArgs {
  const CheckedBatch* checked;
  const SegmentCopy* copies;
  const std::int32_t* lengths;  // of the targets, including the segments
  Rotation rotation;
  std::int32_t num_layers;
};

// One warp: a token's key for one head. Its elements are computed twice rather than kept.
template <class T>
class RotatedRow {
 public:
  __device__ RotatedRow(const T* from, float scale, const float* cosines, const float* sines, const Rotation& rotation)
      : from_(from), scale_(scale), cosines_(cosines), sines_(sines), rotation_(rotation) {}

  __device__ __forceinline__ float operator()(int d) const {
    const int pairs = rotation_.pairs;
    if (d >= 2 * pairs) return Load(d);
    const bool interleaved = rotation_.interleaved;
    const int pair = interleaved ? d / 2 : d % pairs;
    const bool second = interleaved ? d % 2 != 0 : d >= pairs;
    const int apart = interleaved ? 1 : pairs;
    const float x = Load(d), other = Load(second ? d - apart : d + apart);
    const float kept = __fmul_rn(x, cosines_[pair]), added = __fmul_rn(other, sines_[pair]);
    return second ? __fadd_rn(kept, added) : __fsub_rn(kept, added);
  }

 private:
  __device__ __forceinline__ float Load(int d) const {
    if constexpr (kIsQuantized<T>) return __fmul_rn(ToFloat(from_[d]), scale_);
    return ToFloat(from_[d]);
  }

  const T* const from_;
  const float scale_;
  const float* const cosines_;
  const float* const sines_;
  const Rotation& rotation_;
};

// One block for some tokens of one copy in one layer, one warp per row of head_dim elements.
template <class T>
__global__ void __launch_bounds__(kThreads) RotateKernel(const __grid_constant__ RotateArgs args) {
  KVPAGE_DYNAMIC_SHARED(angles);
  const CountedBlock counted(args.checked, /*last=*/true);
  WaitForPriorKernel();
  const CheckedBatch& checked = *args.checked;
  if (checked.ok == 0) return;
  const KVView& view = checked.view;
  const int pairs = args.rotation.pairs;
  float* const cosines = reinterpret_cast<float*>(angles);
  float* const sines = cosines + pairs;
  const std::int64_t piece = blockIdx.x % kPieces, layer = blockIdx.x / kPieces % args.num_layers;
  const SegmentCopy copy = args.copies[blockIdx.x / kPieces / args.num_layers];
  if (copy.source == -1) return;
  const std::int32_t to = args.lengths[copy.target] - copy.count;
  const float* const inv_freq = args.rotation.inv_freq + layer * pairs;
  const double distance = static_cast<double>(to) - copy.begin;
  bool rotates = false;
  for (int i = 0; i < pairs; ++i) rotates = rotates || distance * inv_freq[i] != 0.0;
  if (rotates) {
    for (int i = static_cast<int>(threadIdx.x); i < pairs; i += kThreads) {
      const CosineAndSine at = CosineAndSineOf(distance * inv_freq[i]);
      cosines[i] = at.cosine;
      sines[i] = at.sine;
    }
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int heads = view.num_kv_heads, dim = view.head_dim;
  const std::int64_t rows = CeilDiv(copy.count - piece, kPieces) * heads * 2;
  for (std::int64_t r = warp; r < rows; r += kThreads / kWarpSize) {
    const int kv = static_cast<int>(r % 2), head = static_cast<int>(r / 2 % heads);
    const std::int64_t token = piece + r / 2 / heads * kPieces;
    const auto* const from_row = reinterpret_cast<const T*>(view.At(copy.source, copy.begin + token, layer, kv, head));
    auto* const to_row = reinterpret_cast<T*>(view.At(copy.target, to + token, layer, kv, head));
    const float* from_scale = nullptr;
    float* to_scale = nullptr;
    if constexpr (kIsQuantized<T>) {
      from_scale = view.Scale(copy.source, copy.begin + token, layer, kv, head);
      to_scale = view.Scale(copy.target, to + token, layer, kv, head);
    }
    if (kv != 0 || !rotates) {
      for (int d = lane; d < dim; d += kWarpSize) to_row[d] = from_row[d];
      if constexpr (kIsQuantized<T>) {
        if (lane == 0) *to_scale = *from_scale;
      }
      continue;
    }
    const RotatedRow<T> row(from_row, kIsQuantized<T> ? *from_scale : 1.0f, cosines, sines, args.rotation);
    if constexpr (kIsQuantized<T>) {
      unsigned top = 0;
      for (int d = lane; d < dim; d += kWarpSize) top = max(top, Magnitude(row(d)));
      const RowScale<T> scale(__reduce_max_sync(kFullMask, top));
      for (int d = lane; d < dim; d += kWarpSize) {
        reinterpret_cast<std::uint8_t*>(to_row)[d] = static_cast<std::uint8_t>(scale.Bits(row(d)));
      }
      if (lane == 0) *to_scale = scale.scale;
    } else {
      for (int d = lane; d < dim; d += kWarpSize) to_row[d] = FromFloat<T>(row(d));
    }
  }
}

template <class T>
Status LaunchRotation(const RotateArgs& args, std::int64_t blocks, Stream stream) {
  const auto shared = static_cast<std::size_t>(args.rotation.pairs) * 2 * sizeof(float);
  const LaunchShape shape = {static_cast<unsigned>(blocks), kThreads, shared > 0 ? shared : 1, /*overlap=*/true};
  return Launch<RotateKernel<T>>("copy_rotated", shape, stream, args);
}

}  // namespace

Status CopyRotated(const CacheOperands& cache, const std::int32_t* own, const SegmentList& list,
                   const Rotation& rotation, std::uint32_t* new_epoch, std::int32_t* new_lengths, void* checked,
                   Stream stream) {
  const std::int64_t layers = cache.spec[kSpecNumLayers], blocks = list.num_copies * layers * kPieces;
  const ReuseArgs args = {ToArgs(cache, true, own, blocks), list, new_epoch, new_lengths,
                          static_cast<CheckedBatch*>(checked)};
  KVPAGE_RETURN_IF_ERROR(Launch<ReuseKernel>(OpName(cache.op), OneBlock(cache), stream, args));
  if (blocks == 0) return {};
  const RotateArgs rotate = {args.checked, list.copies, new_lengths, rotation, static_cast<std::int32_t>(layers)};
  const Status launched = ForStorage(static_cast<DType>(cache.spec[kSpecDType]), [&](auto stored) {
    return LaunchRotation<decltype(stored)>(rotate, blocks, stream);
  });
  return CountOutUnless(launched, checked, blocks, stream);
}

}  // namespace kvpage::cuda
