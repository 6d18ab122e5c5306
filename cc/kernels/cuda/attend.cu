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

// The planner, after a check in a separate launch.
__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const __grid_constant__ AttentionParams p) {
  WaitForPriorKernel();
  LetNextKernelStart();
  PlanBatch(p);
}

// Check and planner in one launch.
__global__ void __launch_bounds__(kCheckThreads)
    CheckAndPlanKernel(const __grid_constant__ BatchCheckArgs args, const __grid_constant__ AttentionParams p) {
  KVPAGE_DYNAMIC_SHARED(marks);
  KVPAGE_SHARED(CheckShared, shared);
  LetNextKernelStart();
  CheckBatch(args, &shared, reinterpret_cast<std::uint32_t*>(marks));
  PlanBatch(p);
}

bool UsesTensorCores(const AttentionOperands& attention, bool aligned) {
  return aligned && HasTensorCoreKernels(attention);
}

// Fills the parameters, except those that depend on the kernel's shape.
void Fill(const AttentionOperands& a, std::int64_t num_sequences, std::int64_t num_tokens, bool tensor_cores,
          int num_sms, void* scratch, AttentionParams* p) {
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

  const AttentionScratch at = LayOut(a, num_sequences, num_tokens, tensor_cores, p->blocks);
  p->partials_per_row = at.partials_per_row;
  p->max_prefill_states = at.max_prefill_states;
  char* const base = static_cast<char*>(scratch);
  p->checked = static_cast<const CheckedBatch*>(scratch);
  p->plan.counts = reinterpret_cast<PlanCounts*>(base + at.counts);
  p->plan.decode_sequences = reinterpret_cast<Sequence*>(base + at.decode_sequences);
  p->plan.prefill_sequences = reinterpret_cast<Sequence*>(base + at.prefill_sequences);
  p->plan.cost_prefix = reinterpret_cast<std::int64_t*>(base + at.cost_prefix);
  p->plan.unit_prefix = reinterpret_cast<std::int32_t*>(base + at.unit_prefix);
  p->plan.state_prefix = reinterpret_cast<std::int32_t*>(base + at.state_prefix);
  p->plan.split_points = reinterpret_cast<SplitPoint*>(base + at.split_points);
  p->plan.split_units = reinterpret_cast<SplitUnit*>(base + at.split_units);
  p->plan.arrived = reinterpret_cast<std::int32_t*>(base + at.arrived);
  p->plan.partial_values = reinterpret_cast<float*>(base + at.partial_values);
  p->plan.partial_sums = reinterpret_cast<float2*>(base + at.partial_sums);
  p->plan.prefill_states = reinterpret_cast<float*>(base + at.prefill_states);
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
  // The system reserves a kilobyte per block.
  limits->beside = std::min<std::int64_t>(limits->alone, all / kBlocksPerSm - 1024 - kMaxStaticSharedBytes);
  return {};
}

namespace {

// Launches the attention kernels after the planner.
Status LaunchPlanned(const AttentionOperands& attention, const AttentionParams& params, bool tensor_cores,
                     Stream stream) {
  if (!tensor_cores) return LaunchGeneral(attention.kv_dtype, params, stream);
  if (attention.kv_dtype == DType::kI8) return LaunchDecodeInt8(params, stream);
  if (attention.kv_dtype == DType::kF8E4M3) return LaunchDecodeFloat8(params, stream);
  const bool half = attention.kv_dtype == DType::kF16;
  KVPAGE_RETURN_IF_ERROR(half ? LaunchDecodeF16(params, stream) : LaunchDecodeBf16(params, stream));
  // A batch of so few rows has no prefill.
  if (params.num_tokens * params.group <= kTileRows) return {};
  return half ? LaunchPrefillF16(params, stream) : LaunchPrefillBf16(params, stream);
}

}  // namespace

Status LaunchAttention(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                       bool aligned, void* scratch, Stream stream) {
  int num_sms = 0;
  KVPAGE_RETURN_IF_ERROR(NumSms(&num_sms));
  const bool tensor_cores = UsesTensorCores(attention, aligned);
  AttentionParams params = {};
  Fill(attention, num_sequences, num_tokens, tensor_cores, num_sms, scratch, &params);
  const LaunchShape shape = {1, kPlanThreads, 0, /*overlap=*/true};
  KVPAGE_RETURN_IF_ERROR(Launch<PlanKernel>("plan", shape, stream, params));
  return LaunchPlanned(attention, params, tensor_cores, stream);
}

Status Attend(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
              const AppendOperands* append, std::uint32_t* new_epoch, void* scratch, Stream stream) {
  int num_sms = 0;
  KVPAGE_RETURN_IF_ERROR(NumSms(&num_sms));
  // In a pool, rows of all head sizes of the tensor core kernels are aligned.
  const bool tensor_cores = HasTensorCoreKernels(attention);
  AttentionParams params = {};
  Fill(attention, batch.num_sequences, batch.num_tokens, tensor_cores, num_sms, scratch, &params);
  const BatchCheckArgs args =
      ToArgs(cache, batch, attention.layer, attention.options.sliding_window, append != nullptr, new_epoch, scratch);
  const LaunchShape shape = {1, kCheckThreads, CheckSharedBytes(cache), /*overlap=*/false};
  KVPAGE_RETURN_IF_ERROR(Launch<CheckAndPlanKernel>("check_and_plan", shape, stream, args, params));
  if (append != nullptr) {
    KVPAGE_RETURN_IF_ERROR(
        LaunchAppend(static_cast<const CheckedBatch*>(scratch), batch.num_tokens, *append, attention.kv_dtype, stream));
  }
  return LaunchPlanned(attention, params, tensor_cores, stream);
}

Status AttendWithTables(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const AttentionOperands& attention, void* scratch, Stream stream) {
  KVPAGE_RETURN_IF_ERROR(LaunchTableCheck(view, num_pages, lengths, offsets, num_sequences, num_tokens,
                                          attention.options.sliding_window, scratch, stream));
  return LaunchAttention(attention, num_sequences, num_tokens, IsAligned(view), scratch, stream);
}

}  // namespace kvpage::cuda
