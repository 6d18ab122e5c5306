// Handlers that access keys and values: append_kv, paged_attention, update_and_attend, gather_context, and attention
// over plain page arrays (attend_with_tables).
#include <vector>

#include "cache/shared_runs.h"
#include "ffi/attention_options.h"
#include "ffi/bindings.h"
#include "ffi/cpu/recorded.h"
#include "ffi/cpu/shard_faults.h"
#include "ffi/cpu/thread_pool.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"
#include "kernels/cpu/kernels.h"

namespace kvpage {
namespace {

// `runs` belongs to the pool whose slots the view addresses, or is null. `limits`: see AttentionArgs.
ffi::Error Attend(const char* op, const KVView& view, std::int64_t layer, const std::vector<Sequence>& sequences,
                  const SharedRuns* runs, Any q, const OptionOperands& options, ffi::Result<Any> out,
                  ffi::Result<F32> lse, Parallel& parallel, const std::int32_t* limits = nullptr) {
  cpu::AttentionArgs args;
  args.limits = limits;
  KVPAGE_FFI_RETURN_IF_ERROR(CheckQuery(op, q, view.num_kv_heads, view.head_dim, &args.q_dtype));
  const auto shape = q.dimensions();
  args.kv = view;
  args.layer = layer;
  args.q = q.untyped_data();
  args.out = out->untyped_data();
  args.lse = lse->element_count() > 0 ? lse->typed_data() : nullptr;
  args.num_tokens = shape[0];
  args.num_q_heads = static_cast<std::int32_t>(shape[1]);
  args.sequences = &sequences;
  KVPAGE_FFI_RETURN_IF_ERROR(ToOptions(op, options, args.num_q_heads, &args.options));
  const auto attend = [&](const SharedPrefixes& prefixes) {
    args.prefixes = &prefixes;
    return cpu::Attend(args, parallel);
  };
  return ToError(runs != nullptr ? runs->ReadTogether(sequences, attend) : attend({}));
}

ffi::Error Append(const char* op, const KVView& view, std::int64_t layer, const std::vector<Sequence>& sequences, Any k,
                  Any v, Parallel& parallel) {
  cpu::AppendArgs args;
  KVPAGE_FFI_RETURN_IF_ERROR(CheckKeysAndValues(op, k, v, view.num_kv_heads, view.head_dim, &args.dtype));
  args.kv = view;
  args.layer = layer;
  args.k = k.untyped_data();
  args.v = v.untyped_data();
  args.sequences = &sequences;
  cpu::Append(args, parallel);
  return ffi::Error::Success();
}

// An op on one layer of a pool's slots, which are pinned while it exists. `view` and `sequences` address them.
struct LayerCall {
  // `num_tokens`: number of rows of q or k; -1 if there are none. `window`: only for attention, otherwise null.
  Status Start(const char* op, const S32& handle, const U32& epoch, const S32& lengths, const S32& slots,
               const S32& offsets, const S32& layer_operand, SpecAttr spec, std::int64_t num_tokens, bool append,
               const S32* window = nullptr, bool by_block = false) {
    KVPAGE_RETURN_IF_ERROR(Resolve(op, handle, spec, &pool));
    layer = layer_operand.typed_data()[0];
    BatchRef batch = Batch(slots, offsets, num_tokens);
    batch.attends = window != nullptr;
    batch.limits = limits;
    if (batch.attends && window->element_count() > 0) batch.window = window->typed_data()[0];
    KVPAGE_RETURN_IF_ERROR(
        pool->Begin(op, Cache(handle, epoch, lengths), batch, layer, append, &pinned, by_block ? &table : nullptr));
    view = by_block ? table.view : pool->View();
    sequences = by_block ? &table.sequences : &pinned.sequences();
    return {};
  }

  // What the sequences have in common; unknown with table addressing, where they are not identified by slots.
  const SharedRuns* shared_runs() const { return sequences == &table.sequences ? nullptr : &pool->shared_runs(); }

  std::shared_ptr<Pool> pool;  // outlives the pins
  PinnedSlots pinned;
  TableCall table;
  KVView view;
  const std::vector<Sequence>* sequences = nullptr;
  std::int64_t layer = 0;
  const std::int32_t* limits = nullptr;  // for attention, set before Start: see BatchRef
};

ffi::Error AppendKV(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets, S32 layer,
                    Any k, Any v, SpecAttr spec, ffi::Result<U32> new_epoch) {
  static const char* const kOp = "append_kv";
  LayerCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(
      call.Start(kOp, handle, epoch, lengths, slots, offsets, layer, spec, Rows(k), /*append=*/true));
  new_epoch->typed_data()[0] = call.pinned.epoch();
  XlaParallel parallel(&threads);
  return Append(kOp, call.view, call.layer, *call.sequences, k, v, parallel);
}

ffi::Error PagedAttention(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                          S32 layer, Any q, S32 window, F32 sinks, F32 alibi, SpecAttr spec, float scale,
                          float soft_cap, std::int32_t exact_weights, std::int32_t addressing, ffi::Result<Any> out,
                          ffi::Result<F32> lse) {
  static const char* const kOp = "paged_attention";
  LayerCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(call.Start(kOp, handle, epoch, lengths, slots, offsets, layer, spec, Rows(q),
                                        /*append=*/false, &window, addressing != 0));
  XlaParallel parallel(&threads);
  return Attend(kOp, call.view, call.layer, *call.sequences, call.shared_runs(), q,
                {window, sinks, alibi, scale, soft_cap, exact_weights}, out, lse, parallel);
}

ffi::Error UpdateAndAttend(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                           S32 layer, Any q, Any k, Any v, S32 window, F32 sinks, F32 alibi, SpecAttr spec, float scale,
                           float soft_cap, std::int32_t exact_weights, std::int32_t addressing, ffi::Result<Any> out,
                           ffi::Result<F32> lse, ffi::Result<U32> new_epoch) {
  static const char* const kOp = "update_and_attend";
  LayerCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(call.Start(kOp, handle, epoch, lengths, slots, offsets, layer, spec, Rows(q),
                                        /*append=*/true, &window, addressing != 0));
  new_epoch->typed_data()[0] = call.pinned.epoch();
  XlaParallel parallel(&threads);
  if (ffi::Error error = Append(kOp, call.view, call.layer, *call.sequences, k, v, parallel); error.failure())
    return error;
  return Attend(kOp, call.view, call.layer, *call.sequences, call.shared_runs(), q,
                {window, sinks, alibi, scale, soft_cap, exact_weights}, out, lse, parallel);
}

// ---- on one device of several ----

ffi::Error TryAppendKV(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets, S32 layer,
                       Any k, Any v, SpecAttr spec, ffi::Result<U32> new_epoch, ffi::Result<S32> fault) {
  const std::uint32_t before = epoch.typed_data()[0];
  const ffi::Error error = AppendKV(threads, handle, epoch, lengths, slots, offsets, layer, k, v, spec, new_epoch);
  if (error.failure()) new_epoch->typed_data()[0] = before;
  return Deferred(error, fault);
}

// The part of attention over a sequence that is split between devices: which of this device's keys a new token sees
// does not follow from its index among the new tokens.
ffi::Error AttendToOwnKeys(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                           S32 layer, Any q, S32 limits, SpecAttr spec, bool by_block, const OptionOperands& options,
                           ffi::Result<Any> out, ffi::Result<F32> lse) {
  static const char* const kOp = "paged_attention";
  KVPAGE_FFI_RETURN_IF_ERROR(CheckCount(kOp, "limits", limits.element_count(), Rows(q)));
  LayerCall call;
  call.limits = limits.typed_data();
  KVPAGE_FFI_RETURN_IF_ERROR(call.Start(kOp, handle, epoch, lengths, slots, offsets, layer, spec, Rows(q),
                                        /*append=*/false, &options.sliding_window, by_block));
  XlaParallel parallel(&threads);
  return Attend(kOp, call.view, call.layer, *call.sequences, call.shared_runs(), q, options, out, lse, parallel,
                call.limits);
}

ffi::Error AttendToLimits(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                          S32 layer, Any q, S32 limits, S32 window, F32 sinks, F32 alibi, SpecAttr spec, float scale,
                          float soft_cap, std::int32_t exact_weights, std::int32_t addressing, ffi::Result<Any> out,
                          ffi::Result<F32> lse, ffi::Result<S32> fault) {
  return Deferred(AttendToOwnKeys(threads, handle, epoch, lengths, slots, offsets, layer, q, limits, spec,
                                  addressing != 0, {window, sinks, alibi, scale, soft_cap, exact_weights}, out, lse),
                  fault);
}

// ---- gathering ----

ffi::Error GatherContext(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets, S32 layer,
                         SpecAttr spec, ffi::Result<Any> k, ffi::Result<Any> v) {
  static const char* const kOp = "read_kv / paged_attention (xla)";
  LayerCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(
      call.Start(kOp, handle, epoch, lengths, slots, offsets, layer, spec, -1, /*append=*/false));
  // Rows of the result are in batch order; `pinned` contains only the active ones.
  std::vector<cpu::GatherArgs::Row> rows(slots.element_count());
  for (std::size_t s = 0, active = 0; s < rows.size(); ++s) {
    if (active == call.pinned.sequences().size() || call.pinned.sequences()[active].slot != slots.typed_data()[s])
      continue;
    const Sequence& sequence = call.pinned.sequences()[active++];
    rows[s] = {sequence.slot, sequence.position + sequence.query_length};
  }
  cpu::GatherArgs args;
  args.kv = call.view;
  args.layer = call.layer;
  args.rows = &rows;
  args.row_tokens = k->dimensions()[1];
  args.k = k->untyped_data();
  args.v = v->untyped_data();
  XlaParallel parallel(&threads);
  cpu::Gather(args, parallel);
  return ffi::Error::Success();
}

// There is no pool for plain arrays, so block tables are checked here.
Status TableSequences(const S32& block_tables, const S32& lengths, const S32& offsets, std::int64_t num_tokens,
                      std::int64_t num_pages, std::int64_t page_size, std::vector<Sequence>* out) {
  static const std::string kOp = "paged_attention_with_tables: ";
  const std::int64_t count = static_cast<std::int64_t>(lengths.element_count());
  const std::int64_t width = block_tables.dimensions()[1];
  const std::int32_t* offset = offsets.typed_data();
  if (offset[0] != 0) return InvalidArgument(kOp + "query_offsets[0] is " + std::to_string(offset[0]) + ", wanted 0");
  for (std::int64_t s = 0; s < count; ++s) {
    const std::int64_t length = lengths.typed_data()[s];
    const std::int64_t queries = std::int64_t{offset[s + 1]} - offset[s];
    const std::string name = "sequence " + std::to_string(s);
    if (queries < 0 || offset[s + 1] > num_tokens) {
      return InvalidArgument(kOp + "query_offsets must not decrease nor pass the " + std::to_string(num_tokens) +
                             " tokens; they are wrong at " + name);
    }
    if (queries == 0 || length <= 0) continue;
    if (length < queries) {
      return InvalidArgument(kOp + name + " has " + std::to_string(queries) + " query tokens, but lengths says " +
                             std::to_string(length) + " (they are counted in it)");
    }
    const std::int64_t pages = (length + page_size - 1) / page_size;
    if (pages > width) {
      return OutOfRange(kOp + name + " has " + std::to_string(length) + " tokens, its table holds " +
                        std::to_string(width * page_size));
    }
    for (std::int64_t p = 0; p < pages; ++p) {
      const std::int32_t page = block_tables.typed_data()[s * width + p];
      if (page < 0 || page >= num_pages) {
        return OutOfRange(kOp + "block_tables[" + std::to_string(s) + ", " + std::to_string(p) + "] is " +
                          std::to_string(page) + ", pages are 0.." + std::to_string(num_pages - 1));
      }
    }
    out->push_back({static_cast<std::int32_t>(s), offset[s], static_cast<std::int32_t>(queries),
                    static_cast<std::int32_t>(length - queries)});
  }
  return {};
}

ffi::Error AttendWithTables(ffi::ThreadPool threads, Any q, Any k_pages, Any v_pages, S32 block_tables, S32 lengths,
                            S32 offsets, S32 window, F32 sinks, F32 alibi, float scale, float soft_cap,
                            std::int32_t exact_weights, std::int32_t kv_layout, ffi::Result<Any> out,
                            ffi::Result<F32> lse) {
  static const char* const kOp = "paged_attention_with_tables";
  KVView view;
  KVPAGE_FFI_RETURN_IF_ERROR(PageView(k_pages, v_pages, block_tables, kv_layout, &view));
  std::vector<Sequence> sequences;
  KVPAGE_FFI_RETURN_IF_ERROR(
      TableSequences(block_tables, lengths, offsets, Rows(q), Rows(k_pages), view.tokens_per_chunk, &sequences));
  XlaParallel parallel(&threads);
  return Attend(kOp, view, 0, sequences, nullptr, q, {window, sinks, alibi, scale, soft_cap, exact_weights}, out, lse,
                parallel);
}

auto ThreadPoolBinding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER(kAppendKV, Recorded<&AppendKV>::Run, BindAppendKV(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kPagedAttention, Recorded<&PagedAttention>::Run, BindPagedAttention(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kUpdateAndAttend, Recorded<&UpdateAndAttend>::Run, BindUpdateAndAttend(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kTryAppendKV, TryAppendKV, BindTryAppendKV(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kAttendToLimits, AttendToLimits, BindAttendToLimits(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kGatherContext, Recorded<&GatherContext>::Run, BindGatherContext(ThreadPoolBinding()));
XLA_FFI_DEFINE_HANDLER(kAttendWithTables, AttendWithTables, BindAttendWithTables(ThreadPoolBinding()));

}  // namespace

std::vector<Target> AttentionTargets() {
  return {{"jax_kvpage_append_kv", kAppendKV},
          {"jax_kvpage_paged_attention", kPagedAttention},
          {"jax_kvpage_update_and_attend", kUpdateAndAttend},
          {"jax_kvpage_try_append_kv", kTryAppendKV},
          {"jax_kvpage_attend_to_limits", kAttendToLimits},
          {"jax_kvpage_gather_context", kGatherContext},
          {"jax_kvpage_attend_with_tables", kAttendWithTables}};
}

}  // namespace kvpage
