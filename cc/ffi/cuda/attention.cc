// CUDA handlers that access keys and values: append_kv, paged_attention, update_and_attend, gather_context, and
// attention over plain page arrays (attend_with_tables).
#include <algorithm>
#include <string>
#include <utility>

#include "cache/registry.h"
#include "ffi/attention_options.h"
#include "ffi/bindings.h"
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"
#include "vmm/cuda_context.h"

namespace kvpage {
namespace {

Status ToAttention(const char* op, const Any& q, const OptionOperands& options, DType kv_dtype, std::int64_t kv_heads,
                   std::int64_t head_dim, std::int64_t max_context, ffi::Result<Any>* out, ffi::Result<F32>* lse,
                   cuda::AttentionOperands* attention) {
  KVPAGE_RETURN_IF_ERROR(CheckQuery(op, q, kv_heads, head_dim, &attention->q_dtype));
  const std::int64_t heads = q.dimensions()[1];
  KVPAGE_RETURN_IF_ERROR(ToOptions(op, options, heads, &attention->options));
  KVPAGE_RETURN_IF_ERROR(
      CheckCount(op, "the output", (*out)->element_count(), static_cast<std::int64_t>(q.element_count())));
  const bool wants_lse = (*lse)->element_count() > 0;
  if (wants_lse) KVPAGE_RETURN_IF_ERROR(CheckCount(op, "lse", (*lse)->element_count(), Rows(q) * heads));
  attention->q = q.untyped_data();
  attention->out = (*out)->untyped_data();
  attention->lse = wants_lse ? (*lse)->typed_data() : nullptr;
  attention->kv_dtype = kv_dtype;
  attention->num_q_heads = static_cast<std::int32_t>(heads);
  attention->num_kv_heads = static_cast<std::int32_t>(kv_heads);
  attention->head_dim = static_cast<std::int32_t>(head_dim);
  attention->max_context = max_context;
  return {};
}

// Called by an op with addressing="table" before it queues anything: opens the block tables of the pools on its device.
// If that fails for its own pool, the op's check finds that there is no table. The first call maps and copies memory,
// possibly while this thread captures a graph.
Status OpenTables(DeviceOp op, std::int32_t ordinal) {
  if (device_tables_open(ordinal)) return {};
  DeviceState* device = nullptr;
  KVPAGE_RETURN_IF_ERROR(FindDeviceFor(OpName(op), ordinal, &device));
  const UncapturedScope uncaptured(device->driver());
  OpenDeviceTables(ordinal);
  return {};
}

// An op on one layer of a pool's slots.
struct LayerOperands {
  S32 slots;
  S32 offsets;
  S32 layer;
  std::int64_t num_tokens = -1;  // number of rows of q or k; -1 if there are none
};

struct LayerCall : CudaCall {
  Status ToAppend(const Any& k, const Any& v, cuda::AppendOperands* append) const {
    KVPAGE_RETURN_IF_ERROR(CheckKeysAndValues(op(), k, v, num_kv_heads(), head_dim(), &append->dtype));
    KVPAGE_RETURN_IF_ERROR(CheckCount(op(), "k's first dimension", Rows(k), batch.num_tokens));
    append->layer = layer;
    append->k = k.untyped_data();
    append->v = v.untyped_data();
    append->num_kv_heads = static_cast<std::int32_t>(num_kv_heads());
    append->head_dim = static_cast<std::int32_t>(head_dim());
    return {};
  }
  // paged_attention if `append` is null.
  Status Attend(const Any& q, const OptionOperands& options, bool by_table, const U8& plan,
                const cuda::AppendOperands* append, ffi::Result<Any> out, ffi::Result<F32> lse,
                std::uint32_t* new_epoch, Scratch scratch) const {
    cuda::AttentionOperands attention;
    KVPAGE_RETURN_IF_ERROR(
        ToAttention(op(), q, options, dtype(), num_kv_heads(), head_dim(), max_seq_len(), &out, &lse, &attention));
    attention.layer = layer;
    attention.max_slots = max_slots();
    attention.by_table = by_table;
    attention.may_share =
        cuda::CanGroup(attention, batch.num_sequences) && device->MayFindRuns(static_cast<cu::Stream>(stream));
    KVPAGE_RETURN_IF_ERROR(
        CheckScratch(op(), scratch, cuda::AttentionBytes(attention, batch.num_sequences, batch.num_tokens)));
    if (plan.element_count() < cuda::PlanBytes(batch.num_sequences)) {
      return InvalidArgument(std::string(op()) + ": the program was compiled with a plan of " +
                             std::to_string(plan.element_count()) + " bytes, this version takes " +
                             std::to_string(cuda::PlanBytes(batch.num_sequences)) + ": compile it again");
    }
    return cuda::Attend(cache, batch, attention, append, plan.typed_data(), new_epoch, scratch->typed_data(), stream);
  }

  cuda::BatchOperands batch;
  const std::int32_t* layer = nullptr;
};

// Like QueueOnPool, but `queue` gets a LayerCall.
template <class Queue>
ffi::Error QueueOnLayer(DeviceOp op, const CudaPlace& place, const PoolOperands& operands, const LayerOperands& layer,
                        const Queue& queue) {
  return QueueOnPool(op, place, operands, [&](const CudaCall& started) -> Status {
    LayerCall call{started, {}, layer.layer.typed_data()};
    KVPAGE_RETURN_IF_ERROR(ToBatch(call.op(), layer.slots, layer.offsets, layer.num_tokens, &call.batch));
    KVPAGE_RETURN_IF_ERROR(CheckCount(call.op(), "layer", layer.layer.element_count(), 1));
    return queue(call);
  });
}

ffi::Error AppendKV(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                    S32 layer, Any k, Any v, SpecAttr spec, ffi::Result<U32> new_epoch, Scratch scratch) {
  const auto queue = [&](const LayerCall& call) -> Status {
    cuda::AppendOperands append;
    KVPAGE_RETURN_IF_ERROR(call.ToAppend(k, v, &append));
    KVPAGE_RETURN_IF_ERROR(
        CheckScratch(call.op(), scratch, cuda::CheckedBytes(call.batch.num_sequences, call.max_slots())));
    return cuda::AppendKV(call.cache, call.batch, append, new_epoch->typed_data(), scratch->typed_data(), stream);
  };
  return QueueOnLayer(DeviceOp::kAppendKV, {stream, ordinal}, {handle, epoch, lengths, spec},
                      {slots, offsets, layer, Rows(k)}, queue);
}

ffi::Error PagedAttention(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots,
                          S32 offsets, S32 layer, Any q, S32 window, F32 sinks, F32 alibi, SpecAttr spec, float scale,
                          float soft_cap, std::int32_t exact_weights, std::int32_t addressing, ffi::Result<Any> out,
                          ffi::Result<F32> lse, U8 plan, Scratch scratch) {
  const auto queue = [&](const LayerCall& call) -> Status {
    return call.Attend(q, {window, sinks, alibi, scale, soft_cap, exact_weights}, addressing != 0, plan, nullptr, out,
                       lse, nullptr, scratch);
  };
  if (addressing != 0) KVPAGE_FFI_RETURN_IF_ERROR(OpenTables(DeviceOp::kPagedAttention, ordinal));
  return QueueOnLayer(DeviceOp::kPagedAttention, {stream, ordinal}, {handle, epoch, lengths, spec},
                      {slots, offsets, layer, Rows(q)}, queue);
}

ffi::Error UpdateAndAttend(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots,
                           S32 offsets, S32 layer, Any q, Any k, Any v, S32 window, F32 sinks, F32 alibi, SpecAttr spec,
                           float scale, float soft_cap, std::int32_t exact_weights, std::int32_t addressing,
                           ffi::Result<Any> out, ffi::Result<F32> lse, ffi::Result<U32> new_epoch, U8 plan,
                           Scratch scratch) {
  const auto queue = [&](const LayerCall& call) -> Status {
    cuda::AppendOperands append;
    KVPAGE_RETURN_IF_ERROR(call.ToAppend(k, v, &append));
    return call.Attend(q, {window, sinks, alibi, scale, soft_cap, exact_weights}, addressing != 0, plan, &append, out,
                       lse, new_epoch->typed_data(), scratch);
  };
  if (addressing != 0) KVPAGE_FFI_RETURN_IF_ERROR(OpenTables(DeviceOp::kUpdateAndAttend, ordinal));
  return QueueOnLayer(DeviceOp::kUpdateAndAttend, {stream, ordinal}, {handle, epoch, lengths, spec},
                      {slots, offsets, layer, Rows(q)}, queue);
}

// Reads no keys and values, only numbers that programs carry (lengths, slots and offsets) and the pool's information
// about common prefixes, which may change between programs but not within one. So XLA may make one plan for all layers
// of a step. The kernel counts itself in when it reads the pool, so no Queueing is needed: no drain needs to wait for a
// launch that is not queued yet.
ffi::Error PlanAttention(void* stream, std::int32_t ordinal, S32 handle, S32 lengths, S32 slots, S32 offsets,
                         S32 window, SpecAttr spec, std::int64_t num_tokens, std::int32_t num_q_heads,
                         std::int32_t q_dtype, std::int32_t exact_weights, ffi::Result<U8> plan) {
  static const char* const kOp = "attention's plan";
  cuda::AttentionOperands attention;
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "the spec attribute", spec.size(), kNumSpecFields));
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "the cache's handle", handle.element_count(), 2));
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "the cache's lengths", lengths.element_count(), spec[kSpecMaxSlots]));
  attention.q_dtype = static_cast<DType>(q_dtype);
  attention.kv_dtype = static_cast<DType>(spec[kSpecDType]);
  attention.num_q_heads = num_q_heads;
  attention.num_kv_heads = static_cast<std::int32_t>(spec[kSpecNumKVHeads]);
  attention.head_dim = static_cast<std::int32_t>(spec[kSpecHeadDim]);
  attention.max_context = spec[kSpecMaxSeqLen];
  attention.max_slots = spec[kSpecMaxSlots];
  attention.options.sliding_window = window.element_count() > 0 ? window.typed_data() : nullptr;
  attention.options.exact_weights = exact_weights != 0;
  cuda::BatchOperands batch;
  KVPAGE_FFI_RETURN_IF_ERROR(ToBatch(kOp, slots, offsets, num_tokens, &batch));
  KVPAGE_FFI_RETURN_IF_ERROR(CheckScratch(kOp, plan, cuda::PlanBytes(batch.num_sequences)));
  cuda::CacheOperands cache;
  DeviceState* const device = FindDevice(ordinal);  // if null, attention will report that there is no pool
  cache.pools = device != nullptr ? device->table() : nullptr;
  cache.handle = handle.typed_data();
  cache.lengths = lengths.typed_data();
  std::copy(spec.begin(), spec.end(), cache.spec.begin());
  return ToError(cuda::PlanAttention(cache, batch, attention, plan->typed_data(), stream));
}

ffi::Error GatherContext(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                         S32 layer, SpecAttr spec, ffi::Result<Any> k, ffi::Result<Any> v, Scratch scratch) {
  const auto queue = [&](const LayerCall& call) -> Status {
    const auto shape = k->dimensions();
    const std::int64_t row_tokens = shape.size() == 4 ? shape[1] : 0;
    for (ffi::Result<Any> result : {k, v}) {
      KVPAGE_RETURN_IF_ERROR(CheckCount(call.op(), "the gathered context", result->element_count(),
                                        call.batch.num_sequences * row_tokens * call.num_kv_heads() * call.head_dim()));
    }
    KVPAGE_RETURN_IF_ERROR(
        CheckScratch(call.op(), scratch, cuda::CheckedBytes(call.batch.num_sequences, call.max_slots())));
    return cuda::GatherContext(call.cache, call.batch, call.layer, row_tokens, k->untyped_data(), v->untyped_data(),
                               scratch->typed_data(), stream);
  };
  return QueueOnLayer(DeviceOp::kGatherContext, {stream, ordinal}, {handle, epoch, lengths, spec},
                      {slots, offsets, layer, -1}, queue);
}

// Uses no pool, so no Queueing is needed: no drain needs to wait for it.
ffi::Error AttendWithTables(void* stream, std::int32_t, Any q, Any k_pages, Any v_pages, S32 block_tables, S32 lengths,
                            S32 offsets, S32 window, F32 sinks, F32 alibi, float scale, float soft_cap,
                            std::int32_t exact_weights, std::int32_t kv_layout, ffi::Result<Any> out,
                            ffi::Result<F32> lse, Scratch scratch) {
  static const char* const kOp = "paged_attention_with_tables";
  KVView view;
  KVPAGE_FFI_RETURN_IF_ERROR(PageView(k_pages, v_pages, block_tables, kv_layout, &view));
  const auto sequences = static_cast<std::int64_t>(lengths.element_count());
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "query_offsets", offsets.element_count(), sequences + 1));
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "block_tables' first dimension", block_tables.dimensions()[0], sequences));
  cuda::AttentionOperands attention;
  KVPAGE_FFI_RETURN_IF_ERROR(ToAttention(kOp, q, {window, sinks, alibi, scale, soft_cap, exact_weights}, view.dtype,
                                         view.num_kv_heads, view.head_dim, view.table_width * view.tokens_per_chunk,
                                         &out, &lse, &attention));
  KVPAGE_FFI_RETURN_IF_ERROR(
      CheckScratch(kOp, scratch, cuda::AttentionBytes(attention, sequences, Rows(q)) + cuda::PlanBytes(sequences)));
  return ToError(cuda::AttendWithTables(view, Rows(k_pages), lengths.typed_data(), offsets.typed_data(), sequences,
                                        Rows(q), attention, scratch->typed_data(), stream));
}

KVPAGE_DEFINE_CUDA_HANDLER(kAppendKV, AppendKV, WithScratch(BindAppendKV(CudaBinding())));
KVPAGE_DEFINE_CUDA_HANDLER(kPlanAttention, PlanAttention, BindPlanAttention(CudaBinding()));
KVPAGE_DEFINE_CUDA_HANDLER(kPagedAttention, PagedAttention, WithScratch(WithPlan(BindPagedAttention(CudaBinding()))));
KVPAGE_DEFINE_CUDA_HANDLER(kUpdateAndAttend, UpdateAndAttend,
                           WithScratch(WithPlan(BindUpdateAndAttend(CudaBinding()))));
KVPAGE_DEFINE_CUDA_HANDLER(kGatherContext, GatherContext, WithScratch(BindGatherContext(CudaBinding())));
KVPAGE_DEFINE_CUDA_HANDLER(kAttendWithTables, AttendWithTables, WithScratch(BindAttendWithTables(CudaBinding())));

}  // namespace

Status LoadCudaKernels() { return cuda::LoadKernels(); }

std::vector<Target> CudaSlotTargets();  // slots.cc

std::vector<Target> CudaTargets() {
  std::vector<Target> targets = {{"jax_kvpage_append_kv", kAppendKV},
                                 {"jax_kvpage_plan_attention", kPlanAttention},
                                 {"jax_kvpage_paged_attention", kPagedAttention},
                                 {"jax_kvpage_update_and_attend", kUpdateAndAttend},
                                 {"jax_kvpage_gather_context", kGatherContext},
                                 {"jax_kvpage_attend_with_tables", kAttendWithTables}};
  for (const Target& target : CudaSlotTargets()) targets.push_back(target);
  return targets;
}

}  // namespace kvpage
