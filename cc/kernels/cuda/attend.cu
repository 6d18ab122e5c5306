// Attention on CUDA: the launches of one call, which are the check, the append, the planner and the attention kernels.
// Launches and grids depend on shapes only.
#include <algorithm>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/prefill_queue.cuh"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/tokens.cuh"

namespace kvpage::cuda {
namespace {

// The planner, run after the check of the same call, for a plan that serves this call only.
__global__ void __launch_bounds__(kPlanThreads) PlanCheckedKernel(const __grid_constant__ AttentionParams p) {
  WaitForPriorKernel();
  LetNextKernelStart();
  p.state.ZeroCounters();
  if (p.checked->ok == 0) return;
  const Sequence* const sequences = p.checked->sequences();
  const KVView& view = p.checked->view;
  const PrefixRuns runs = {p.checked->groups_hold != 0 ? view.table : nullptr,
                           nullptr,
                           view.table_width,
                           static_cast<std::int32_t>(min(view.tokens_per_chunk, std::int64_t{0x7fffffff})),
                           0,
                           0};
  PlanBatch(p, p.checked->sliding_window, runs, [&](std::int32_t index) { return sequences[index]; });
}

struct PlanArgs {
  CacheArgs cache;
  const std::int32_t* slots;    // [num_sequences]
  const std::int32_t* offsets;  // [num_sequences + 1]
  const std::int32_t* window;   // [1] or null
  std::int64_t max_slots;
  std::int64_t max_context;
};

// The same sequence as CheckBatch produces if the batch is valid.
__device__ inline Sequence PlannedSequence(const PlanArgs& args, std::int64_t num_tokens, std::int32_t index) {
  const std::int32_t slot = args.slots[index], begin = args.offsets[index];
  const std::int64_t count = std::int64_t{args.offsets[index + 1]} - begin;
  Sequence sequence;
  sequence.slot = -1;
  if (slot < 0 || slot >= args.max_slots || begin < 0 || count <= 0 || begin + count > num_tokens) return sequence;
  const std::int32_t length = args.cache.lengths[slot];
  if (length < 0 || length + count > args.max_context) return sequence;
  sequence.slot = slot;
  sequence.position = length;
  sequence.query_begin = begin;
  sequence.query_length = static_cast<std::int32_t>(count);
  return sequence;
}

// Called by one thread: gets the pool's runs, which show common prefixes. Counts the caller in as a reader of the pool;
// returns null if there is no pool of this spec, which the check will report.
__device__ inline DevicePool* EnterForRuns(const CacheArgs& cache, const AttentionParams& p, PrefixRuns* runs) {
  *runs = {nullptr, nullptr, 0, static_cast<std::int32_t>(cache.spec[kSpecBlockTokens]), 0, 0};
  if (cache.pools == nullptr || p.max_prefix_rows == 0) return nullptr;
  PoolHead head;
  DevicePool* const pool = EnterPool(cache.pools, cache.handle[0], 1, &head);
  if (pool == nullptr) return nullptr;
  bool same = head.open != 0;
  for (int i = 0; i < kNumSpecFields; ++i) same = same && head.spec[i] == cache.spec[i];
  if (!same) {
    CountOut(&pool->readers, 1);
    return nullptr;
  }
  const volatile DevicePool& entry = *pool;
  runs->pool = head.id;
  runs->run_cuts = entry.run_cuts;
  __threadfence();  // the check sees any cut made after this
  runs->blocks = entry.runs.blocks;
  if (runs->blocks == nullptr) return pool;
  __threadfence();  // the host copies this pointer after the counts and the width
  runs->counts = entry.runs.counts;
  runs->width = entry.runs.width;
  return pool;
}

__global__ void __launch_bounds__(kPlanThreads)
    PlanKernel(const __grid_constant__ PlanArgs args, const __grid_constant__ AttentionParams p) {
  KVPAGE_SHARED(DevicePool*, pool);
  KVPAGE_SHARED(PrefixRuns, runs);
  if (threadIdx.x == 0) pool = EnterForRuns(args.cache, p, &runs);
  __syncthreads();
  const std::int32_t window = args.window != nullptr ? *args.window : 0;
  PlanBatch(p, window, runs, [&](std::int32_t index) { return PlannedSequence(args, p.num_tokens, index); });
  __syncthreads();
  if (threadIdx.x == 0 && pool != nullptr) CountOut(&pool->readers, 1);
}

bool UsesTensorCores(const AttentionOperands& attention, bool aligned) {
  return aligned && HasTensorCoreKernels(attention);
}

void PlacePlan(void* memory, std::int64_t num_sequences, int blocks, Plan* plan) {
  const PlanLayout at = LayOutPlan(num_sequences, blocks);
  char* const base = static_cast<char*>(memory);
  plan->counts = reinterpret_cast<PlanCounts*>(base + at.counts);
  plan->decode_sequences = reinterpret_cast<Sequence*>(base + at.decode_sequences);
  plan->prefill_sequences = reinterpret_cast<Sequence*>(base + at.prefill_sequences);
  plan->cost_prefix = reinterpret_cast<std::int64_t*>(base + at.cost_prefix);
  plan->unit_prefix = reinterpret_cast<std::int32_t*>(base + at.unit_prefix);
  plan->state_prefix = reinterpret_cast<std::int32_t*>(base + at.state_prefix);
  plan->split_points = reinterpret_cast<SplitPoint*>(base + at.split_points);
  plan->split_units = reinterpret_cast<SplitUnit*>(base + at.split_units);
  plan->prefix_spans = reinterpret_cast<std::int32_t*>(base + at.prefix_spans);
  plan->prefix_rows = reinterpret_cast<std::int32_t*>(base + at.prefix_rows);
  plan->groups = reinterpret_cast<PrefixGroup*>(base + at.prefix_groups);
  plan->members = reinterpret_cast<std::int32_t*>(base + at.members);
  plan->prefix_states = reinterpret_cast<PrefixState*>(base + at.prefix_states);
}

// Fills in the parameters, except those that depend on the kernel's shape and the addresses of plan and scratch memory.
// `layout` is the layout of the scratch memory.
Status Fill(const AttentionOperands& a, std::int64_t num_sequences, std::int64_t num_tokens, bool tensor_cores,
            AttentionParams* p, AttentionScratch* layout) {
  int num_sms = 0;
  KVPAGE_RETURN_IF_ERROR(NumSms(&num_sms));
  p->q = a.q;
  p->out = a.out;
  p->lse = a.lse;
  p->options = a.options;
  p->num_tokens = num_tokens;
  p->num_sequences = static_cast<std::int32_t>(num_sequences);
  p->num_q_heads = a.num_q_heads;
  p->num_kv_heads = a.num_kv_heads;
  p->group = a.num_q_heads / a.num_kv_heads;
  p->head_dim = a.head_dim;
  p->decode_rows = tensor_cores && HasPrefillKernel(a.kv_dtype) ? kTileRows : 0x7fffffff;
  p->prefill_rows = PrefillRows(a.head_dim);
  p->blocks = kBlocksPerSm * std::min(num_sms, kMaxSms);
  p->heads_together = HeadsTogether(a.num_kv_heads, p->blocks);
  p->pieces = p->blocks / p->heads_together;
  p->q_dtype = a.q_dtype;
  *layout = LayOut(a, num_sequences, num_tokens, tensor_cores, p->blocks);
  p->partials_per_row = layout->partials_per_row;
  p->max_prefill_states = layout->max_prefill_states;
  p->max_prefix_rows = layout->max_prefix_rows;
  p->least_saved = a.least_saved_bytes;
  if (p->max_prefix_rows > 0) KVPAGE_RETURN_IF_ERROR(GetGroupRows(a.head_dim, &p->group_rows));
  return {};
}

void PlaceScratch(const AttentionScratch& at, void* scratch, AttentionParams* p) {
  char* const base = static_cast<char*>(scratch);
  p->checked = static_cast<const CheckedBatch*>(scratch);
  p->state.next_item = reinterpret_cast<std::int32_t*>(base + at.counters);
  p->state.finished = p->state.next_item + 1;
  p->state.arrived = p->state.finished + p->blocks;
  p->state.num_counters = static_cast<std::int32_t>(at.num_counters);
  p->state.partial_values = reinterpret_cast<float*>(base + at.partial_values);
  p->state.partial_sums = reinterpret_cast<float2*>(base + at.partial_sums);
  p->state.prefill_states = reinterpret_cast<float*>(base + at.prefill_states);
  p->state.prefix_values = reinterpret_cast<float*>(base + at.prefix_values);
  p->state.prefix_sums = reinterpret_cast<float2*>(base + at.prefix_sums);
}

}  // namespace

Status GetSharedLimits(SharedLimits* limits) {
  int device = 0, alone = 0, all = 0;
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "cudaGetDevice"));
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&alone, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                  "cudaDeviceGetAttribute"));
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                                  "cudaDeviceGetAttribute"));
  limits->alone = alone - kMaxStaticSharedBytes;
  // CUDA reserves a kilobyte of shared memory per block.
  limits->beside = std::min<std::int64_t>(limits->alone, all / kBlocksPerSm - 1024 - kMaxStaticSharedBytes);
  return {};
}

namespace {

// Launches the attention kernels, which follow the planner.
Status LaunchPlanned(const AttentionOperands& attention, AttentionParams params, bool tensor_cores, Stream stream) {
  // A batch with this few rows has no prefill.
  const bool prefill =
      tensor_cores && HasPrefillKernel(attention.kv_dtype) && params.num_tokens * params.group > kTileRows;
  params.last = !prefill;
  if (!tensor_cores) return LaunchGeneral(attention.kv_dtype, params, stream);
  if (attention.kv_dtype == DType::kI8) return LaunchDecodeInt8(params, stream);
  if (attention.kv_dtype == DType::kF8E4M3) return LaunchDecodeFloat8(params, stream);
  const bool half = attention.kv_dtype == DType::kF16;
  if (params.max_prefix_rows > 0) {
    KVPAGE_RETURN_IF_ERROR(half ? LaunchGroupedF16(params, stream) : LaunchGroupedBf16(params, stream));
  }
  KVPAGE_RETURN_IF_ERROR(half ? LaunchDecodeF16(params, stream) : LaunchDecodeBf16(params, stream));
  if (!prefill) return {};
  params.last = true;
  return half ? LaunchPrefillF16(params, stream) : LaunchPrefillBf16(params, stream);
}

}  // namespace

Status LaunchAttention(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                       bool aligned, void* scratch, Stream stream) {
  const bool tensor_cores = UsesTensorCores(attention, aligned);
  AttentionParams params = {};
  AttentionScratch layout;
  KVPAGE_RETURN_IF_ERROR(Fill(attention, num_sequences, num_tokens, tensor_cores, &params, &layout));
  PlaceScratch(layout, scratch, &params);
  PlacePlan(static_cast<char*>(scratch) + layout.bytes, num_sequences, params.blocks, &params.plan);
  const LaunchShape shape = {1, kPlanThreads, 0, /*overlap=*/true};
  KVPAGE_RETURN_IF_ERROR(Launch<PlanCheckedKernel>("plan", shape, stream, params));
  return LaunchPlanned(attention, params, tensor_cores, stream);
}

Status PlanAttention(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
                     void* plan, Stream stream) {
  AttentionParams params = {};
  AttentionScratch layout;  // sets partials_per_row and max_prefill_states, which affect the plan
  KVPAGE_RETURN_IF_ERROR(
      Fill(attention, batch.num_sequences, batch.num_tokens, HasTensorCoreKernels(attention), &params, &layout));
  PlacePlan(plan, batch.num_sequences, params.blocks, &params.plan);
  const PlanArgs args = {ToArgs(cache, /*mutates=*/false), batch.slots,         batch.offsets,
                         attention.options.sliding_window, attention.max_slots, attention.max_context};
  return Launch<PlanKernel>("plan", {1, kPlanThreads, 0, /*overlap=*/false}, stream, args, params);
}

Status Attend(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
              const AppendOperands* append, const void* plan, std::uint32_t* new_epoch, void* scratch, Stream stream) {
  // In a pool, all rows are aligned for the head sizes of the tensor core kernels.
  const bool tensor_cores = HasTensorCoreKernels(attention);
  AttentionParams params = {};
  AttentionScratch layout;
  KVPAGE_RETURN_IF_ERROR(Fill(attention, batch.num_sequences, batch.num_tokens, tensor_cores, &params, &layout));
  PlaceScratch(layout, scratch, &params);
  PlacePlan(const_cast<void*>(plan), batch.num_sequences, params.blocks, &params.plan);  // kernels only read the plan
  BatchCheckArgs args = ToArgs(cache, batch, attention.layer, attention.options.sliding_window, append != nullptr,
                               new_epoch, scratch, /*followers=*/params.blocks);
  args.by_table = attention.by_table;
  args.counters = params.state.next_item;
  args.num_counters = params.state.num_counters;
  if (!attention.may_share) params.max_prefix_rows = 0;
  // A plan made at another time may contain groups; if the kernel for groups is not launched, every sequence reads its
  // own context.
  args.plan = params.max_prefix_rows > 0 ? params.plan.counts : nullptr;
  KVPAGE_RETURN_IF_ERROR(LaunchBatchCheck(cache, args, stream));
  const auto launch_rest = [&]() -> Status {
    if (append != nullptr) {
      KVPAGE_RETURN_IF_ERROR(LaunchAppend(static_cast<const CheckedBatch*>(scratch), batch.num_tokens, *append,
                                          attention.kv_dtype, /*last=*/false, stream));
    }
    return LaunchPlanned(attention, params, tensor_cores, stream);
  };
  return CountOutUnless(launch_rest(), scratch, params.blocks, stream);
}

Status AttendWithTables(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const AttentionOperands& attention, void* scratch, Stream stream) {
  KVPAGE_RETURN_IF_ERROR(LaunchTableCheck(view, num_pages, lengths, offsets, num_sequences, num_tokens,
                                          attention.options.sliding_window, scratch, stream));
  return LaunchAttention(attention, num_sequences, num_tokens, IsAligned(view), scratch, stream);
}

}  // namespace kvpage::cuda
