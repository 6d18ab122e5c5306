// Handlers that change which tokens a slot has: map_slots, advance, set_lengths, edit_slots, copy_rotated, after.
#include <cstring>
#include <vector>

#include "cache/messages.h"
#include "ffi/bindings.h"
#include "ffi/cpu/recorded.h"
#include "ffi/cpu/shard_faults.h"
#include "ffi/cpu/thread_pool.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"
#include "kernels/cpu/kernels.h"

namespace kvpage {
namespace {

ffi::Error MapSlots(S32 handle, U32 epoch, S32 lengths, S32 slots, S32 num_tokens, SpecAttr spec,
                    ffi::Result<U32> new_epoch, ffi::Result<ffi::Buffer<ffi::PRED>> ok) {
  static const char* const kOp = "map_slots";
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(kOp, handle, spec, &pool));
  const std::int64_t count = static_cast<std::int64_t>(slots.element_count());
  KVPAGE_FFI_RETURN_IF_ERROR(CheckPerSlot(kOp, slots, num_tokens));
  return ToError(pool->MapSlots(kOp, Cache(handle, epoch, lengths), slots.typed_data(), num_tokens.typed_data(), count,
                                ok->typed_data(), new_epoch->typed_data()));
}

ffi::Error Advance(S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets, SpecAttr spec,
                   ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths) {
  static const char* const kOp = "advance";
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(kOp, handle, spec, &pool));
  return ToError(pool->Advance(kOp, Cache(handle, epoch, lengths), Batch(slots, offsets, -1), new_epoch->typed_data(),
                               new_lengths->typed_data()));
}

ffi::Error SetLengths(S32 handle, U32 epoch, S32 lengths, S32 slots, S32 values, SpecAttr spec,
                      ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths) {
  static const char* const kOp = "set_lengths";
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(kOp, handle, spec, &pool));
  const std::int64_t count = static_cast<std::int64_t>(slots.element_count());
  KVPAGE_FFI_RETURN_IF_ERROR(CheckPerSlot(kOp, slots, values));
  return ToError(pool->SetLengths(kOp, Cache(handle, epoch, lengths), slots.typed_data(), values.typed_data(), count,
                                  new_epoch->typed_data(), new_lengths->typed_data()));
}

// ---- on one device of several (shard_faults.h) ----

ffi::Error TryAdvance(S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets, SpecAttr spec,
                      ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths, ffi::Result<S32> fault) {
  return Deferred(Advance(handle, epoch, lengths, slots, offsets, spec, new_epoch, new_lengths), fault);
}

ffi::Error TrySetLengths(S32 handle, U32 epoch, S32 lengths, S32 slots, S32 values, SpecAttr spec,
                         ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths, ffi::Result<S32> fault) {
  return Deferred(SetLengths(handle, epoch, lengths, slots, values, spec, new_epoch, new_lengths), fault);
}

// ---- queued by the host ----

// Queued by host calls (acquire, release, ...).
ffi::Error EditSlots(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 own, S32 edits, S32 copies,
                     SpecAttr spec, std::int32_t verb, ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths) {
  DeviceOp op_code;
  KVPAGE_FFI_RETURN_IF_ERROR(ToVerb(verb, &op_code));
  const char* const op = OpName(op_code);
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(op, handle, spec, &pool));
  EditList list;
  KVPAGE_FFI_RETURN_IF_ERROR(ToEditList(op, own, edits, copies, &list));
  if (own.typed_data()[0] != handle.typed_data()[0]) {
    return ToError(messages::ForeignCache(op, handle.typed_data()[0], own.typed_data()[0]));
  }
  PinnedSlots pinned;
  KVPAGE_FFI_RETURN_IF_ERROR(pool->EditSlots(op, Cache(handle, epoch, lengths), list, &pinned, new_epoch->typed_data(),
                                             new_lengths->typed_data()));
  if (list.num_copies == 0) return ffi::Error::Success();
  XlaParallel parallel(&threads);
  cpu::CopyTokens(pool->View(), pool->geometry().num_layers, list.copies, list.num_copies, parallel);
  return ffi::Error::Success();
}

ffi::Error CopyRotated(ffi::ThreadPool threads, S32 handle, U32 epoch, S32 lengths, S32 own, S32 copies, F32 inv_freq,
                       SpecAttr spec, std::int32_t interleaved, ffi::Result<U32> new_epoch,
                       ffi::Result<S32> new_lengths) {
  const char* const op = OpName(DeviceOp::kReuseSegment);
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(op, handle, spec, &pool));
  SegmentList list;
  Rotation rotation;
  KVPAGE_FFI_RETURN_IF_ERROR(ToSegmentList(op, own, copies, &list));
  KVPAGE_FFI_RETURN_IF_ERROR(
      ToRotation(op, inv_freq, interleaved, pool->geometry().num_layers, pool->geometry().head_dim, &rotation));
  if (own.typed_data()[0] != handle.typed_data()[0]) {
    return ToError(messages::ForeignCache(op, handle.typed_data()[0], own.typed_data()[0]));
  }
  PinnedSlots pinned;
  std::vector<std::int32_t> to;
  KVPAGE_FFI_RETURN_IF_ERROR(pool->CopyRotated(op, Cache(handle, epoch, lengths), list, &pinned,
                                               new_epoch->typed_data(), new_lengths->typed_data(), &to));
  XlaParallel parallel(&threads);
  cpu::CopyRotated(pool->View(), pool->geometry().num_layers, list, to, rotation, parallel);
  return ffi::Error::Success();
}

// The values are operands, so that XLA computes them before the returned epoch is used.
ffi::Error After(U32 epoch, ffi::RemainingArgs, ffi::Result<U32> new_epoch) {
  std::memmove(new_epoch->typed_data(), epoch.typed_data(), sizeof(std::uint32_t));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kMapSlots, Recorded<&MapSlots>::Run, BindMapSlots(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kAdvance, Recorded<&Advance>::Run, BindLengthChange(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kSetLengths, Recorded<&SetLengths>::Run, BindLengthChange(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kTryAdvance, TryAdvance, BindTryLengthChange(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kTrySetLengths, TrySetLengths, BindTryLengthChange(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kEditSlots, Recorded<&EditSlots>::Run, BindEditSlots(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kCopyRotated, Recorded<&CopyRotated>::Run,
                       BindCopyRotated(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kAfter, After, BindAfter(ffi::Ffi::Bind()));

}  // namespace

std::vector<Target> SlotTargets() {
  return {{"jax_kvpage_map_slots", kMapSlots},       {"jax_kvpage_advance", kAdvance},
          {"jax_kvpage_try_advance", kTryAdvance},   {"jax_kvpage_try_set_lengths", kTrySetLengths},
          {"jax_kvpage_set_lengths", kSetLengths},   {"jax_kvpage_edit_slots", kEditSlots},
          {"jax_kvpage_copy_rotated", kCopyRotated}, {"jax_kvpage_after", kAfter}};
}

}  // namespace kvpage
