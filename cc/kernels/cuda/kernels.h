// CUDA kernels as plain C++ functions: what the FFI handlers call. Every function only queues work on the stream; all
// operands are device memory and none is read on the host, so a call can be captured into a CUDA graph and replayed
// (every function queues at least one launch, because XLA rejects an empty capture).
//
// Every op on a pool begins with one launch that checks the cache value against the pool's table (base/device_table.h),
// bumps the epoch where the op is a mutator, and writes a CheckedBatch for the kernels after it.
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

// Loads the code of all kernels on the current device, which CUDA would do at their first launches (launch.cu). That
// may block, and is better not done while a graph is captured: for whoever opens a device.
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
// edit_slots (edit_slots.cu), queued for the verb that cache.op names; `own` is the handle of the pool whose method was
// called, the lists are device memory. Copies need CheckedBytes(0, 0) of device scratch; without any `checked` is not
// used.
Status EditSlots(const CacheOperands& cache, const std::int32_t* own, const EditList& list, std::uint32_t* new_epoch,
                 std::int32_t* new_lengths, void* checked, Stream stream);
// copy_rotated (copy_rotated.cu): the list and the frequencies are device memory. Needs CheckedBytes(0, 0) of device
// scratch.
Status CopyRotated(const CacheOperands& cache, const std::int32_t* own, const SegmentList& list,
                   const Rotation& rotation, std::uint32_t* new_epoch, std::int32_t* new_lengths, void* checked,
                   Stream stream);
// The device's part of map_slots: checks slots and sizes as Pool::MapSlots does and sets *verdict (device memory) to 1
// or 0; the host does the mapping.
Status CheckMapSlots(const CacheOperands& cache, const std::int32_t* slots, const std::int32_t* tokens,
                     std::int64_t count, std::uint32_t* new_epoch, std::int32_t* verdict, Stream stream);

// ---- keys and values (append.cu, gather.cu, copy.cu) ----
// Bytes of device scratch memory for the CheckedBatch of every op below, and for its check's marks in a pool of many
// slots. Scratch is an operand that XLA owns (the
// custom call's last result), because memory from XLA's scratch allocator would be freed before a captured graph is
// replayed. Its size must depend on shapes only.
std::size_t CheckedBytes(std::int64_t num_sequences, std::int64_t max_slots);

// Up to this many slots the marks by which a check finds duplicates lie in shared memory. Beyond, they lie behind the
// CheckedBatch where the op has one, because readers may run at the same time; else, in ops that change the cache and
// so run one after the other, in DevicePool::marks.
inline constexpr std::int64_t kSharedMarks = 8192;

// Byte offset of those marks in an op's scratch memory.
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

// k, v: [num_sequences, row_tokens, num_kv_heads, head_dim] in the storage type (float32 where that is quantized): the
// tokens that attention would read, zeros after them, NaN when the check failed.
Status GatherContext(const CacheOperands& cache, const BatchOperands& batch, const std::int32_t* layer,
                     std::int64_t row_tokens, void* k, void* v, void* checked, Stream stream);

// Copies whole blocks. `from` and `to` are device pointers to the first byte of a block (fused layout) or of a range's
// block (per-layer layout).
struct BlockCopy {
  const void* from = nullptr;
  void* to = nullptr;
};
Status CopyBlocks(const BlockCopy* copies /* device memory */, std::int64_t count, std::int64_t block_bytes,
                  Stream stream);

// ---- attention (attend.cu) ----
// Reads that sequences with a common beginning must save together before they are grouped (prefix_groups.cuh): what the
// second-level cache delivers while a launch starts and ends.
inline constexpr std::int64_t kLeastSavedBytes = 16 << 20;

struct AttentionOperands {
  const std::int32_t* layer = nullptr;  // [1]
  const void* q = nullptr;              // [num_tokens, num_q_heads, head_dim]
  void* out = nullptr;                  // like q
  float* lse = nullptr;                 // [num_tokens, num_q_heads] or null
  DType q_dtype = DType::kF32;
  DType kv_dtype = DType::kF32;
  std::int32_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t max_context = 0;  // most tokens of one sequence: bounds the scratch memory
  std::int64_t max_slots = 0;    // of the pool; 0 where there is none
  bool by_table = false;         // keys and values are found through the pool's block table, and written so
  std::int64_t least_saved_bytes = kLeastSavedBytes;
  bool may_share = true;  // false: slots have nothing in common; there is no launch for groups then
  AttentionOptions options;
};

// Whether sequences of such a batch can be grouped at all: there is a kernel, and enough to save. Quantized storage and
// float32 are not: their kernels are bound by arithmetic, or have no tiles of several sequences.
bool CanGroup(const AttentionOperands& attention, std::int64_t num_sequences);

// Bytes of device scratch memory for attention over a batch of this shape: CheckedBatch, counters and partial states.
std::size_t AttentionBytes(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens);

// A plan shares the work of a batch out over the device. It depends on the batch, the lengths, the window and what the
// slots have in common, so one serves all layers of a step.
std::size_t PlanBytes(std::int64_t num_sequences);
// What is wrong with the batch is for the check to find: such a sequence is left out here. Of `attention` the shapes,
// types, bounds and the window are used; of `cache` all but the epoch. Sequences that share memory from their beginning
// on are grouped; not where there is no such pool, or cache.pools is null.
Status PlanAttention(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
                     void* plan, Stream stream);

// paged_attention: `append` null. update_and_attend: keys and values are written first. `plan`: from PlanAttention of
// the same lengths, batch and attention.
Status Attend(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
              const AppendOperands* append, const void* plan, std::uint32_t* new_epoch, void* scratch, Stream stream);

// Attention over plain page arrays that `view` describes (with view.table and view.table_width); `lengths`
// [num_sequences] include the query tokens. A sequence with an invalid table or length gets NaN. `scratch`:
// AttentionBytes and PlanBytes.
Status AttendWithTables(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const AttentionOperands& attention, void* scratch, Stream stream);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_KERNELS_H_
