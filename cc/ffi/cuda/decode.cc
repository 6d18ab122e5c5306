#include "ffi/cuda/decode.h"

#include <algorithm>

namespace kvpage {

Status FindDeviceFor(const char* op, std::int32_t ordinal, DeviceState** device) {
  *device = FindDevice(ordinal);
  if (*device != nullptr) return {};
  return FailedPrecondition(std::string(op) + ": there is no pool on CUDA device " + std::to_string(ordinal) +
                            " in this process: make one with KVPool(..., device=...), or run the program on the "
                            "device of its pool");
}

Status CudaCall::Start(DeviceOp device_op, const CudaPlace& place, const PoolOperands& operands) {
  cache.op = device_op;
  stream = place.stream;
  KVPAGE_RETURN_IF_ERROR(FindDeviceFor(op(), place.ordinal, &device));
  KVPAGE_RETURN_IF_ERROR(CheckCount(op(), "the spec attribute", operands.spec.size(), cache.spec.size()));
  std::copy(operands.spec.begin(), operands.spec.end(), cache.spec.begin());
  KVPAGE_RETURN_IF_ERROR(CheckCount(op(), "the cache's handle", operands.handle.element_count(), 2));
  KVPAGE_RETURN_IF_ERROR(CheckCount(op(), "the cache's epoch", operands.epoch.element_count(), 1));
  KVPAGE_RETURN_IF_ERROR(CheckCount(op(), "the cache's lengths", operands.lengths.element_count(), max_slots()));
  cache.pools = device->table();
  cache.handle = operands.handle.typed_data();
  cache.epoch = operands.epoch.typed_data();
  cache.lengths = operands.lengths.typed_data();
  return {};
}

Status ToBatch(const char* op, const S32& slots, const S32& offsets, std::int64_t num_tokens,
               cuda::BatchOperands* batch) {
  batch->slots = slots.typed_data();
  batch->offsets = offsets.typed_data();
  batch->num_sequences = static_cast<std::int64_t>(slots.element_count());
  batch->num_tokens = num_tokens;
  return CheckCount(op, "query_offsets", offsets.element_count(), batch->num_sequences + 1);
}

Status CheckScratch(const char* op, Scratch scratch, std::size_t wanted) {
  if (scratch->element_count() >= wanted) return {};
  return InvalidArgument(std::string(op) + ": the program was compiled with " +
                         std::to_string(scratch->element_count()) + " bytes of scratch memory, this device takes " +
                         std::to_string(wanted) +
                         ": compile it again with this version of jax_kvpage, on this machine");
}

}  // namespace kvpage
