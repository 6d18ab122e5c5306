// Shared by the CUDA handlers. Operands are in device memory: their shapes are checked here, their values by the
// kernels. Only map_slots reads values back.
#ifndef KVPAGE_FFI_CUDA_DECODE_H_
#define KVPAGE_FFI_CUDA_DECODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "base/device_table.h"
#include "base/op_names.h"
#include "base/spec_fields.h"
#include "device/device_state.h"
#include "ffi/decode.h"
#include "kernels/cuda/kernels.h"

namespace kvpage {

// Device memory for the call's own use. It is a result because XLA must know about it: a captured call writes to it at
// each replay.
using U8 = ffi::Buffer<ffi::U8>;
using Scratch = ffi::Result<U8>;

// The device and the stream for which a handler was called.
struct CudaPlace {
  void* stream = nullptr;
  std::int32_t ordinal = 0;
};

// The first operands of every op on a pool, and the spec that it was compiled for.
struct PoolOperands {
  S32 handle;
  U32 epoch;
  S32 lengths;
  SpecAttr spec;
};

// A call of an op on a pool: where it runs, and its operands.
struct CudaCall {
  // Numbers in the spec that determine shapes.
  std::int64_t num_layers() const { return cache.spec[kSpecNumLayers]; }
  std::int64_t num_kv_heads() const { return cache.spec[kSpecNumKVHeads]; }
  std::int64_t head_dim() const { return cache.spec[kSpecHeadDim]; }
  std::int64_t max_slots() const { return cache.spec[kSpecMaxSlots]; }
  std::int64_t max_seq_len() const { return cache.spec[kSpecMaxSeqLen]; }
  DType dtype() const { return static_cast<DType>(cache.spec[kSpecDType]); }
  const char* op() const { return OpName(cache.op); }

  // Finds the device and checks the shapes of the operands.
  Status Start(DeviceOp op, const CudaPlace& place, const PoolOperands& operands);

  DeviceState* device = nullptr;
  void* stream = nullptr;
  cuda::CacheOperands cache;
};

// The handler of an op on a pool: `queue`, a Status(const CudaCall&), checks the other operands and launches kernels. A
// thread that drains the device sees all of its launches or none.
template <class Queue>
ffi::Error QueueOnPool(DeviceOp op, const CudaPlace& place, const PoolOperands& operands, const Queue& queue) {
  CudaCall call;
  KVPAGE_FFI_RETURN_IF_ERROR(call.Start(op, place, operands));
  const DeviceState::Queueing queueing(call.device, static_cast<cu::Stream>(place.stream));
  KVPAGE_FFI_RETURN_IF_ERROR(queueing.status());
  return ToError(queue(call));
}

// The state of a device on which programs run; an error if no pool was created there.
Status FindDeviceFor(const char* op, std::int32_t ordinal, DeviceState** device);

// slots [S] and query_offsets [S + 1]. `num_tokens`: number of rows of q, k and v; -1 if there are none.
Status ToBatch(const char* op, const S32& slots, const S32& offsets, std::int64_t num_tokens,
               cuda::BatchOperands* batch);

Status CheckScratch(const char* op, Scratch scratch, std::size_t wanted);

// The first arguments of every handler: the stream and the device's ordinal.
inline auto CudaBinding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>(); }

// The scratch memory is the last result.
template <class B>
auto WithScratch(B&& binding) {
  return std::forward<B>(binding).template Ret<ffi::Buffer<ffi::U8>>();
}

// The plan is the last operand (PlanAttention) and follows the results in the handler's parameters, which are in the
// order of the binding.
template <class B>
auto WithPlan(B&& binding) {
  return std::forward<B>(binding).template Arg<U8>();
}

// The handler only launches kernels, so XLA may put it into a CUDA graph.
#define KVPAGE_DEFINE_CUDA_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER(name, function, binding, {ffi::Traits::kCmdBufferCompatible})

}  // namespace kvpage

#endif  // KVPAGE_FFI_CUDA_DECODE_H_
