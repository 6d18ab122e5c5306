#include "ffi/decode.h"

#include <algorithm>

#include "cache/registry.h"

namespace kvpage {

Status Resolve(const char* op, const S32& handle, SpecAttr spec, std::shared_ptr<Pool>* pool) {
  if (handle.element_count() != 2) return InvalidArgument(std::string(op) + ": the cache's handle must be int32[2]");
  KVPAGE_RETURN_IF_ERROR(Find(op, handle.typed_data()[0], pool));
  SpecInts ints{};
  if (spec.size() != ints.size()) return InvalidArgument(std::string(op) + ": the spec attribute must have 8 numbers");
  std::copy(spec.begin(), spec.end(), ints.begin());
  return (*pool)->CheckProgram(op, ints);
}

CacheRef Cache(const S32& handle, const U32& epoch, const S32& lengths) {
  return {handle.typed_data()[1], epoch.typed_data()[0], lengths.typed_data()};
}

BatchRef Batch(const S32& slots, const S32& offsets, std::int64_t num_tokens) {
  return {slots.typed_data(), static_cast<std::int64_t>(slots.element_count()), offsets.typed_data(), num_tokens};
}

Status ToDType(const char* what, ffi::DataType type, DType* out) {
  switch (type) {
    case ffi::F32:
      *out = DType::kF32;
      return {};
    case ffi::BF16:
      *out = DType::kBF16;
      return {};
    case ffi::F16:
      *out = DType::kF16;
      return {};
    default:
      return InvalidArgument(std::string(what) + " must be float32, bfloat16 or float16");
  }
}

}  // namespace kvpage
