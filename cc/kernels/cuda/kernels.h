// CUDA kernels as plain C++ functions, to be called by the FFI handlers. The functions only queue work on the stream.
// All operands are device memory, and none is read on the host, so a call can be captured into a CUDA graph and
// replayed (every function queues at least one launch, because XLA rejects an empty capture).
//
// Every op on a pool begins with one launch that checks the cache value against the pool's table (base/device_table.h),
// bumps the epoch if the op is a mutator, and writes a CheckedBatch for the kernels that follow.
#ifndef KVPAGE_KERNELS_CUDA_KERNELS_H_
#define KVPAGE_KERNELS_CUDA_KERNELS_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/attention_options.h"
#include "base/device_table.h"
#include "base/dtype.h"
#include "base/kv_view.h"
#include "base/segment_copies.h"
#include "base/slot_edits.h"
#include "base/status.h"

namespace kvpage::cuda {

using Stream = void*;  // CUstream

// Loads the code of all kernels on the current device, which CUDA would otherwise do at their first launches
// (launch.cu). Loading may block and should not happen while a graph is captured, so call this when a device is opened.
Status LoadKernels();

// The cache as a program carries it, and the spec that the program was compiled for.
struct CacheOperands {
  DeviceOp op = DeviceOp::kAdvance;
  DevicePool* pools = nullptr;            // the device's table, [kDeviceTableEntries]
  const std::int32_t* handle = nullptr;   // [2]
  const std::uint32_t* epoch = nullptr;   // [1]
  const std::int32_t* lengths = nullptr;  // [max_slots]
  std::array<std::int64_t, 8> spec{};
};

struct BatchOperands {
  const std::int32_t* slots = nullptr;    // [num_sequences]
  const std::int32_t* offsets = nullptr;  // [num_sequences + 1]
  std::int64_t num_sequences = 0;
  std::int64_t num_tokens = -1;  // rows of q, k, v; -1: not applicable
};

// ---- the slot table (slots.cu) ----
Status Advance(const CacheOperands& cache, const BatchOperands& batch, std::uint32_t* new_epoch,
               std::int32_t* new_lengths, Stream stream);
Status SetLengths(const CacheOperands& cache, const std::int32_t* slots, const std::int32_t* values, std::int64_t count,
                  std::uint32_t* new_epoch, std::int32_t* new_lengths, Stream stream);
// edit_slots (edit_slots.cu), queued for the host call that cache.op names. `own` is the handle of the pool whose
// method was called; the lists are in device memory. `checked`: CheckedBytes(0, 0) of device scratch, only used if
// there are copies.
Status EditSlots(const CacheOperands& cache, const std::int32_t* own, const EditList& list, std::uint32_t* new_epoch,
                 std::int32_t* new_lengths, void* checked, Stream stream);
// copy_rotated (copy_rotated.cu). The list and the frequencies are in device memory. `checked`: CheckedBytes(0, 0) of
// device scratch.
Status CopyRotated(const CacheOperands& cache, const std::int32_t* own, const SegmentList& list,
                   const Rotation& rotation, std::uint32_t* new_epoch, std::int32_t* new_lengths, void* checked,
                   Stream stream);
// The device's part of map_slots: checks slots and sizes as Pool::MapSlots does and sets *verdict (device memory) to 1
// or 0; the host does the mapping.
Status CheckMapSlots(const CacheOperands& cache, const std::int32_t* slots, const std::int32_t* tokens,
                     std::int64_t count, std::uint32_t* new_epoch, std::int32_t* verdict, Stream stream);

// ---- keys and values (append.cu, gather.cu, copy.cu) ----
// Bytes of device scratch memory for the CheckedBatch of every op below and, in a pool with many slots, for the marks
// of its check. Scratch is an operand that XLA owns (the custom call's last result), because memory from XLA's scratch
// allocator would be freed before a captured graph is replayed. Its size must depend on shapes only.
std::size_t CheckedBytes(std::int64_t num_sequences, std::int64_t max_slots);

// Up to this many slots, the marks by which a check finds duplicates are in shared memory. With more slots, they are
// behind the CheckedBatch if the op has one, because readers may run concurrently; otherwise they are in
// DevicePool::marks, since ops that change the cache run one after the other.
inline constexpr std::int64_t kSharedMarks = 8192;

// Byte offset of the marks in an op's scratch memory.
std::size_t MarksOffset(std::int64_t num_sequences);

struct AppendOperands {
  const std::int32_t* layer = nullptr;  // [1]
  const void* k = nullptr;              // [num_tokens, num_kv_heads, head_dim]
  const void* v = nullptr;
  DType dtype = DType::kF32;  // of k and v; converted to the storage type, rounding to nearest even
  std::int32_t num_kv_heads = 0, head_dim = 0;
};
Status AppendKV(const CacheOperands& cache, const BatchOperands& batch, const AppendOperands& append,
                std::uint32_t* new_epoch, void* checked, Stream stream);

// k, v: [num_sequences, row_tokens, num_kv_heads, head_dim] in the storage type, or float32 if that is quantized. They
// receive the tokens that attention would read, followed by zeros; NaN if the check failed.
Status GatherContext(const CacheOperands& cache, const BatchOperands& batch, const std::int32_t* layer,
                     std::int64_t row_tokens, void* k, void* v, void* checked, Stream stream);

// Copies full blocks. `from` and `to` are device pointers to the first byte of a block (fused layout), or of a block
// within a range (per-layer layout).
struct BlockCopy {
  const void* from = nullptr;
  void* to = nullptr;
};
Status CopyBlocks(const BlockCopy* copies /* device memory */, std::int64_t count, std::int64_t block_bytes,
                  Stream stream);

// ---- attention (attend.cu) ----
// Sequences with a common prefix are grouped only if this saves at least this many bytes of reads in total
// (prefix_groups.cuh): about what the L2 cache delivers while a launch starts and ends.
inline constexpr std::int64_t kLeastSavedBytes = 16 << 20;

struct AttentionOperands {
  const std::int32_t* layer = nullptr;  // [1]
  const void* q = nullptr;              // [num_tokens, num_q_heads, head_dim]
  void* out = nullptr;                  // like q
  float* lse = nullptr;                 // [num_tokens, num_q_heads] or null
  DType q_dtype = DType::kF32;
  DType kv_dtype = DType::kF32;
  std::int32_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t max_context = 0;  // most tokens per sequence; bounds the scratch memory
  std::int64_t max_slots = 0;    // of the pool; 0 if there is no pool
  bool by_table = false;         // find keys and values through the pool's block table, for reads and writes
  std::int64_t least_saved_bytes = kLeastSavedBytes;
  bool may_share = true;  // false: slots have nothing in common, and no kernel for groups is launched
  AttentionOptions options;
};

// Whether sequences of such a batch can be grouped at all: there must be a kernel, and enough to save. Quantized and
// float32 storage cannot: their kernels are bound by arithmetic or have no tiles with rows of several sequences.
bool CanGroup(const AttentionOperands& attention, std::int64_t num_sequences);

// Bytes of device scratch memory for attention over a batch of this shape: CheckedBatch, counters and partial states.
std::size_t AttentionBytes(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens);

// A plan distributes the work of a batch over the device. It depends on the batch, the lengths, the window and what the
// slots have in common, so one plan serves all layers of a step.
std::size_t PlanBytes(std::int64_t num_sequences);
// Does not report invalid sequences, which is the task of the check; they are left out of the plan. Uses the shapes,
// types, bounds and window of `attention`, and all of `cache` except the epoch. Sequences that share memory from their
// beginning on are grouped, unless there is no such pool or cache.pools is null.
Status PlanAttention(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
                     void* plan, Stream stream);

// paged_attention if `append` is null; update_and_attend otherwise, which writes keys and values first. `plan` comes
// from PlanAttention with the same lengths, batch and attention.
Status Attend(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
              const AppendOperands* append, const void* plan, std::uint32_t* new_epoch, void* scratch, Stream stream);

// Attention over plain page arrays that `view` describes, including view.table and view.table_width; `lengths`
// [num_sequences] include the query tokens. The output of a sequence with an invalid table or length is NaN. `scratch`:
// AttentionBytes + PlanBytes.
Status AttendWithTables(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const AttentionOperands& attention, void* scratch, Stream stream);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_KERNELS_H_
