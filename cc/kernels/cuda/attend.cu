// Attention on CUDA: what a call needs of scratch memory, and the launches that it consists of: the check, the append,
// the planner and the attention kernels. Shapes alone decide what is launched, and with which grids.
#include <algorithm>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/check.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/prefill_items.cuh"
#include "kernels/cuda/tokens.cuh"

namespace kvpage::cuda {
namespace {

// The planner behind a check of its own launch.
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

// Hands out parts of the scratch memory, or only counts them.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(std::int64_t count) {
    T* const here = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return here;
  }
  std::size_t size() const { return size_; }

 private:
  char* base_;
  std::size_t size_ = 0;
};

bool UsesTensorCores(const AttentionOperands& attention, bool aligned) {
  return aligned && HasTensorCoreKernels(attention);
}

// Everything but the checked batch's view and what a kernel's shape decides. Returns the bytes of scratch.
std::size_t Fill(const AttentionOperands& a, std::int64_t num_sequences, std::int64_t num_tokens, bool tensor_cores,
                 int num_sms, void* scratch, AttentionParams* p) {
  p->q = a.q;
  p->out = a.out;
  p->lse = a.lse;
  p->sinks = a.sinks;
  p->alibi_slopes = a.alibi_slopes;
  p->num_tokens = num_tokens;
  p->num_sequences = static_cast<std::int32_t>(num_sequences);
  p->num_q_heads = a.num_q_heads;
  p->num_kv_heads = a.num_kv_heads;
  p->group = a.num_q_heads / a.num_kv_heads;
  p->head_dim = a.head_dim;
  p->few_rows = tensor_cores ? kTileRows : 0x7fffffff;
  p->prefill_rows = PrefillRows(a.head_dim);
  p->blocks = kBlocksPerSm * num_sms;
  p->q_dtype = a.q_dtype;
  p->scale = a.scale;
  p->soft_cap = a.soft_cap;

  const std::int64_t context = std::max<std::int64_t>(a.max_context, 1);
  // A unit that blocks share has kTileRows rows at most, and there are no more of them than blocks; and no row of the
  // batch is in two.
  const std::int64_t rows = std::min<std::int64_t>(num_tokens * a.num_q_heads, std::int64_t{p->blocks} * kTileRows);
  p->span_slots = static_cast<std::int32_t>(std::min<std::int64_t>(kMaxSpans, (context >> kSpanShift) + 2));
  const std::int64_t units = std::min<std::int64_t>(
      (num_tokens * p->group / p->prefill_rows + num_sequences) * a.num_kv_heads, kMaxPrefillStates);
  const std::int64_t spans = std::min<std::int64_t>(kMaxPrefillSpans, (context >> kPrefillSpanShift) + 2);
  // One state for each block too: its unit's spans so far.
  const std::int64_t states =
      std::max<std::int64_t>(std::min<std::int64_t>(units * spans, kMaxPrefillStates), p->blocks);
  p->prefill_slots = tensor_cores && context > (1 << kPrefillSpanShift) ? static_cast<std::int32_t>(states) : 0;

  Carver carver(scratch);
  p->checked = reinterpret_cast<const CheckedBatch*>(carver.Take<char>(CheckedBytes(num_sequences)));
  p->plan.counts = carver.Take<PlanCounts>(1);
  p->plan.few = carver.Take<Sequence>(num_sequences);
  p->plan.many = carver.Take<Sequence>(num_sequences);
  p->plan.prefix = carver.Take<std::int64_t>(num_sequences + 1);
  p->plan.items = carver.Take<std::int32_t>(num_sequences + 1);
  p->plan.states = carver.Take<std::int32_t>(num_sequences + 1);
  p->plan.cuts = carver.Take<Cut>(p->blocks + 1);
  p->plan.shared = carver.Take<Shared>(p->blocks);
  p->plan.arrived = carver.Take<std::int32_t>(p->prefill_slots);
  p->plan.values = carver.Take<float>(rows * p->span_slots * a.head_dim);
  p->plan.sums = carver.Take<float2>(rows * p->span_slots);
  p->plan.prefill_states = carver.Take<float>(p->prefill_slots * PrefillStateFloats(a.head_dim));
  return carver.size();
}

}  // namespace

Status GetSharedLimits(SharedLimits* limits) {
  int device = 0, alone = 0, all = 0;
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "cudaGetDevice"));
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&alone, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                  "cudaDeviceGetAttribute"));
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                                  "cudaDeviceGetAttribute"));
  limits->alone = alone;
  // The system takes a kilobyte of every block, and what is not dynamic takes another.
  limits->beside = std::min(alone, all / kBlocksPerSm - 2048);
  return {};
}

bool HasTensorCoreKernels(const AttentionOperands& a) {
  return a.q_dtype == a.kv_dtype && (a.kv_dtype == DType::kBF16 || a.kv_dtype == DType::kF16) &&
         (a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256);
}

std::size_t AttentionBytes(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens) {
  int num_sms = 1;
  if (!NumSms(&num_sms).ok()) return 0;  // the launch will fail and say why
  AttentionParams params = {};
  return Fill(attention, num_sequences, num_tokens, HasTensorCoreKernels(attention), num_sms, nullptr, &params);
}

namespace {

// The attention kernels, behind the planner.
Status LaunchPlanned(const AttentionOperands& attention, const AttentionParams& params, bool tensor_cores,
                     Stream stream) {
  if (!tensor_cores) return LaunchGeneral(attention.kv_dtype, params, stream);
  const bool half = attention.kv_dtype == DType::kF16;
  KVPAGE_RETURN_IF_ERROR(half ? LaunchDecodeF16(params, stream) : LaunchDecodeBf16(params, stream));
  // Nothing for prefill in batches so small.
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
  KVPAGE_RETURN_IF_ERROR(Launch("plan", PlanKernel, shape, stream, params));
  return LaunchPlanned(attention, params, tensor_cores, stream);
}

Status Attend(const CacheOperands& cache, const BatchOperands& batch, const AttentionOperands& attention,
              const AppendOperands* append, std::uint32_t* new_epoch, void* scratch, Stream stream) {
  int num_sms = 0;
  KVPAGE_RETURN_IF_ERROR(NumSms(&num_sms));
  // A pool lays out its blocks so that rows of the sizes that tensor cores take are aligned.
  const bool tensor_cores = HasTensorCoreKernels(attention);
  AttentionParams params = {};
  Fill(attention, batch.num_sequences, batch.num_tokens, tensor_cores, num_sms, scratch, &params);
  const BatchCheckArgs args =
      ToArgs(cache, batch, attention.layer, attention.window, append != nullptr, new_epoch, scratch);
  const LaunchShape shape = {1, kCheckThreads, CheckSharedBytes(cache), /*overlap=*/false};
  KVPAGE_RETURN_IF_ERROR(Launch("check_and_plan", CheckAndPlanKernel, shape, stream, args, params));
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
                                          attention.window, scratch, stream));
  return LaunchAttention(attention, num_sequences, num_tokens, IsAligned(view), scratch, stream);
}

}  // namespace kvpage::cuda
