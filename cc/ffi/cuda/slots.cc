// CUDA handlers that change which tokens a slot has: map_slots, advance, set_lengths, edit_slots, copy_rotated, after.
#include <algorithm>
#include <vector>

#include "cache/registry.h"
#include "ffi/bindings.h"
#include "ffi/cuda/decode.h"
#include "ffi/handlers.h"

namespace kvpage {
namespace {

ffi::Error Advance(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 offsets,
                   SpecAttr spec, ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths) {
  const auto queue = [&](const CudaCall& call) -> Status {
    cuda::BatchOperands batch;
    KVPAGE_RETURN_IF_ERROR(ToBatch(call.op(), slots, offsets, -1, &batch));
    return cuda::Advance(call.cache, batch, new_epoch->typed_data(), new_lengths->typed_data(), stream);
  };
  return QueueOnPool(DeviceOp::kAdvance, {stream, ordinal}, {handle, epoch, lengths, spec}, queue);
}

ffi::Error SetLengths(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 values,
                      SpecAttr spec, ffi::Result<U32> new_epoch, ffi::Result<S32> new_lengths) {
  const auto queue = [&](const CudaCall& call) -> Status {
    KVPAGE_RETURN_IF_ERROR(CheckPerSlot(call.op(), slots, values));
    return cuda::SetLengths(call.cache, slots.typed_data(), values.typed_data(),
                            static_cast<std::int64_t>(slots.element_count()), new_epoch->typed_data(),
                            new_lengths->typed_data(), stream);
  };
  return QueueOnPool(DeviceOp::kSetLengths, {stream, ordinal}, {handle, epoch, lengths, spec}, queue);
}

// Queued by host calls (acquire, release, ...).
ffi::Error EditSlots(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 own, S32 edits,
                     S32 copies, SpecAttr spec, std::int32_t verb, ffi::Result<U32> new_epoch,
                     ffi::Result<S32> new_lengths, Scratch scratch) {
  DeviceOp op;
  KVPAGE_FFI_RETURN_IF_ERROR(ToVerb(verb, &op));
  const auto queue = [&](const CudaCall& call) -> Status {
    EditList list;
    KVPAGE_RETURN_IF_ERROR(ToEditList(call.op(), own, edits, copies, &list));
    KVPAGE_RETURN_IF_ERROR(CheckScratch(call.op(), scratch, list.num_copies > 0 ? cuda::CheckedBytes(0, 0) : 0));
    return cuda::EditSlots(call.cache, own.typed_data(), list, new_epoch->typed_data(), new_lengths->typed_data(),
                           scratch->typed_data(), stream);
  };
  return QueueOnPool(op, {stream, ordinal}, {handle, epoch, lengths, spec}, queue);
}

ffi::Error CopyRotated(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 own, S32 copies,
                       F32 inv_freq, SpecAttr spec, std::int32_t interleaved, ffi::Result<U32> new_epoch,
                       ffi::Result<S32> new_lengths, Scratch scratch) {
  const auto queue = [&](const CudaCall& call) -> Status {
    SegmentList list;
    Rotation rotation;
    KVPAGE_RETURN_IF_ERROR(ToSegmentList(call.op(), own, copies, &list));
    KVPAGE_RETURN_IF_ERROR(ToRotation(call.op(), inv_freq, interleaved, call.num_layers(), call.head_dim(), &rotation));
    KVPAGE_RETURN_IF_ERROR(CheckScratch(call.op(), scratch, cuda::CheckedBytes(0, 0)));
    return cuda::CopyRotated(call.cache, own.typed_data(), list, rotation, new_epoch->typed_data(),
                             new_lengths->typed_data(), scratch->typed_data(), stream);
  };
  return QueueOnPool(DeviceOp::kReuseSegment, {stream, ordinal}, {handle, epoch, lengths, spec}, queue);
}

// The data that map_slots copies to the host, in pinned memory.
struct MapRequest {
  std::int32_t handle[2];
  std::int32_t verdict;
  std::int32_t count;
  std::int32_t* slots() { return reinterpret_cast<std::int32_t*>(this + 1); }
  std::int32_t* tokens() { return slots() + count; }
  bool* ok() { return reinterpret_cast<bool*>(tokens() + count); }
  static std::size_t Bytes(std::int64_t count) {
    return sizeof(MapRequest) + static_cast<std::size_t>(count) * (2 * sizeof(std::int32_t) + sizeof(bool));
  }
};

// Queues the check, and the copies of what the host needs to know.
Status QueueMapRequest(const CudaCall& call, const S32& slots, const S32& tokens, std::uint32_t* new_epoch,
                       DeviceState::Staging* staging, void* stream) {
  MapRequest* const request = reinterpret_cast<MapRequest*>(staging->data());
  const auto count = static_cast<std::int64_t>(slots.element_count());
  request->count = static_cast<std::int32_t>(count);
  const auto xla = static_cast<cu::Stream>(stream);
  const DeviceState::Queueing queueing(call.device, xla);
  KVPAGE_RETURN_IF_ERROR(queueing.status());
  KVPAGE_RETURN_IF_ERROR(cuda::CheckMapSlots(call.cache, slots.typed_data(), tokens.typed_data(), count, new_epoch,
                                             staging->OnDevice(&request->verdict), stream));
  const auto fetch = [&](void* to, const std::int32_t* from, std::int64_t n) -> Status {
    if (n == 0) return {};
    KVPAGE_CU(call.device->driver(), MemcpyDtoHAsync, "for map_slots", to, reinterpret_cast<cu::DevicePtr>(from),
              static_cast<std::size_t>(n) * sizeof(std::int32_t), xla);
    return {};
  };
  KVPAGE_RETURN_IF_ERROR(fetch(request->handle, call.cache.handle, 2));
  KVPAGE_RETURN_IF_ERROR(fetch(request->slots(), slots.typed_data(), count));
  return fetch(request->tokens(), tokens.typed_data(), count);
}

// The only op that waits for its stream: the driver calls need the numbers on the host.
ffi::Error MapSlots(void* stream, std::int32_t ordinal, S32 handle, U32 epoch, S32 lengths, S32 slots, S32 num_tokens,
                    SpecAttr spec, ffi::Result<U32> new_epoch, ffi::Result<ffi::Buffer<ffi::PRED>> ok) {
  CudaCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(call.Start(DeviceOp::kMapSlots, {stream, ordinal}, {handle, epoch, lengths, spec}));
  KVPAGE_FFI_RETURN_IF_ERROR(CheckPerSlot(call.op(), slots, num_tokens));
  const auto count = static_cast<std::int64_t>(slots.element_count());
  DeviceState::Staging staging(call.device);
  KVPAGE_FFI_RETURN_IF_ERROR(staging.Reserve(MapRequest::Bytes(count)));
  MapRequest* const request = reinterpret_cast<MapRequest*>(staging.data());
  const Status queued = QueueMapRequest(call, slots, num_tokens, new_epoch->typed_data(), &staging, stream);
  // Wait even if something could not be queued, because the staging memory is reused by the next call.
  KVPAGE_FFI_RETURN_IF_ERROR(call.device->Synchronize(static_cast<cu::Stream>(stream)));
  KVPAGE_FFI_RETURN_IF_ERROR(queued);
  std::shared_ptr<Pool> pool;
  const Status found = Find(call.op(), request->handle[0], &pool);
  if (request->verdict != 0) {
    KVPAGE_FFI_RETURN_IF_ERROR(found);
    KVPAGE_FFI_RETURN_IF_ERROR(pool->CheckProcess(call.op()));
    // Over a mesh, this may map in the arenas of all devices. The driver calls make the context of each device current
    // themselves.
    KVPAGE_FFI_RETURN_IF_ERROR(
        pool->MapChecked(call.op(), request->handle[1], request->slots(), request->tokens(), count, request->ok()));
  } else {
    std::fill_n(request->ok(), count, false);  // the fault has been recorded
    if (found.ok() && pool->device() == ordinal && pool->CheckProcess(call.op()).ok()) {
      pool->PassOverMap(request->handle[1]);
    }
  }
  if (count == 0) return ffi::Error::Success();
  return ToError(call.device->Upload(reinterpret_cast<cu::DevicePtr>(ok->typed_data()), request->ok(),
                                     static_cast<std::size_t>(count), static_cast<cu::Stream>(stream)));
}

// The values are operands, so that XLA computes them before the returned epoch is used. Something must be queued even
// if both epochs share a buffer, because XLA does not capture calls that queue nothing.
ffi::Error After(void* stream, std::int32_t ordinal, U32 epoch, ffi::RemainingArgs, ffi::Result<U32> new_epoch) {
  DeviceState* device = nullptr;
  KVPAGE_FFI_RETURN_IF_ERROR(FindDeviceFor("after", ordinal, &device));
  const bool moved = new_epoch->typed_data() != epoch.typed_data();
  const auto to = moved ? reinterpret_cast<cu::DevicePtr>(new_epoch->typed_data()) : device->spare_word();
  return ToError(device->CopyOnDevice(to, reinterpret_cast<cu::DevicePtr>(epoch.typed_data()), sizeof(std::uint32_t),
                                      static_cast<cu::Stream>(stream)));
}

XLA_FFI_DEFINE_HANDLER(kMapSlots, MapSlots, BindMapSlots(CudaBinding()));
KVPAGE_DEFINE_CUDA_HANDLER(kAdvance, Advance, BindLengthChange(CudaBinding()));
KVPAGE_DEFINE_CUDA_HANDLER(kSetLengths, SetLengths, BindLengthChange(CudaBinding()));
KVPAGE_DEFINE_CUDA_HANDLER(kEditSlots, EditSlots, WithScratch(BindEditSlots(CudaBinding())));
KVPAGE_DEFINE_CUDA_HANDLER(kCopyRotated, CopyRotated, WithScratch(BindCopyRotated(CudaBinding())));
KVPAGE_DEFINE_CUDA_HANDLER(kAfter, After, BindAfter(CudaBinding()));

}  // namespace

std::vector<Target> CudaSlotTargets() {
  return {{"jax_kvpage_map_slots", kMapSlots},       {"jax_kvpage_advance", kAdvance},
          {"jax_kvpage_set_lengths", kSetLengths},   {"jax_kvpage_edit_slots", kEditSlots},
          {"jax_kvpage_copy_rotated", kCopyRotated}, {"jax_kvpage_after", kAfter}};
}

}  // namespace kvpage
