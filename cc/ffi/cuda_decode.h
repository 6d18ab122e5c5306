// What the handlers for CUDA share. Operands lie in device memory: their shapes are checked here, their values by the
// kernels. No handler reads a value back but map_slots.
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

// Device memory of the call's own. A result, because XLA must know of it: a captured call writes to it at each replay.
using Scratch = ffi::Result<ffi::Buffer<ffi::U8>>;

// An op on a pool: where it runs and what it was given.
struct CudaCall {
  // The numbers of the spec that shapes depend on.
  std::int64_t num_layers() const { return cache.spec[kSpecNumLayers]; }
  std::int64_t num_kv_heads() const { return cache.spec[kSpecNumKVHeads]; }
  std::int64_t head_dim() const { return cache.spec[kSpecHeadDim]; }
  std::int64_t max_slots() const { return cache.spec[kSpecMaxSlots]; }
  std::int64_t max_seq_len() const { return cache.spec[kSpecMaxSeqLen]; }
  DType dtype() const { return static_cast<DType>(cache.spec[kSpecDType]); }
  const char* op() const { return OpName(cache.op); }

  Status Start(DeviceOp op, std::int32_t ordinal, const S32& handle, const U32& epoch, const S32& lengths,
               SpecAttr spec);

  DeviceState* device = nullptr;
  cuda::CacheOperands cache;
};

// The state of a device that programs run on; an error when no pool was made there.
Status FindDeviceFor(const char* op, std::int32_t ordinal, DeviceState** device);

// An operand must have so many elements.
Status CheckCount(const char* op, const char* name, std::size_t have, std::int64_t wanted);

// slots [S] and query_offsets [S + 1]. `num_tokens`: rows of q, k and v; -1 when there are none.
Status ToBatch(const char* op, const S32& slots, const S32& offsets, std::int64_t num_tokens,
               cuda::BatchOperands* batch);

Status CheckScratch(const char* op, Scratch scratch, std::size_t wanted);

// What every handler is bound to first: the stream and the device's ordinal.
inline auto CudaBinding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>(); }

// The scratch memory is the last result.
template <class B>
auto WithScratch(B&& binding) {
  return std::forward<B>(binding).template Ret<ffi::Buffer<ffi::U8>>();
}

// Launches kernels and does nothing else, so XLA may put it into a CUDA graph.
#define KVPAGE_DEFINE_CUDA_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER(name, function, binding, {ffi::Traits::kCmdBufferCompatible})

}  // namespace kvpage

#endif  // KVPAGE_FFI_CUDA_DECODE_H_
