// Shared by all handlers: converts XLA's typed buffers to the pool's plain arguments, and Status to ffi::Error.
#ifndef KVPAGE_FFI_DECODE_H_
#define KVPAGE_FFI_DECODE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/dtype.h"
#include "base/kv_view.h"
#include "base/op_names.h"
#include "base/segment_copies.h"
#include "base/slot_edits.h"
#include "base/status.h"
#include "cache/pool.h"
#include "xla/ffi/api/ffi.h"

namespace kvpage {

namespace ffi = ::xla::ffi;

using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using F32 = ffi::Buffer<ffi::F32>;
using Any = ffi::AnyBuffer;
using SpecAttr = ffi::Span<const std::int64_t>;

#define KVPAGE_FFI_RETURN_IF_ERROR(expr)                  \
  do {                                                    \
    ::kvpage::Status _status = (expr);                    \
    if (!_status.ok()) return ::kvpage::ToError(_status); \
  } while (false)

inline ffi::Error ToError(const Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()), status.message());
}

// Finds the pool that a cache names and checks that the program was compiled for its spec.
Status Resolve(const char* op, const S32& handle, SpecAttr spec, std::shared_ptr<Pool>* pool);

CacheRef Cache(const S32& handle, const U32& epoch, const S32& lengths);
BatchRef Batch(const S32& slots, const S32& offsets, std::int64_t num_tokens);

// Checks that the operand `name` has `wanted` elements.
Status CheckCount(const char* op, const char* name, std::size_t have, std::int64_t wanted);

Status ToDType(const char* what, ffi::DataType type, DType* out);

// First dimension; 0 for a scalar.
inline std::int64_t Rows(const Any& x) { return x.dimensions().size() > 0 ? x.dimensions()[0] : 0; }

// Checks that q is [tokens, kv_heads * n, head_dim], or k and v are [tokens, kv_heads, head_dim]; sets *dtype.
Status CheckQuery(const char* op, const Any& q, std::int64_t kv_heads, std::int64_t head_dim, DType* dtype);
Status CheckKeysAndValues(const char* op, const Any& k, const Any& v, std::int64_t kv_heads, std::int64_t head_dim,
                          DType* dtype);
// edit_slots: the host call for which it was queued, and its lists, which on CUDA are in device memory. `own` is the
// handle of the pool whose method was called.
Status ToVerb(std::int32_t attribute, DeviceOp* verb);
Status ToEditList(const char* op, const S32& own, const S32& edits, const S32& copies, EditList* list);
// copy_rotated: its list and its rotation, which on CUDA are in device memory.
Status ToSegmentList(const char* op, const S32& own, const S32& copies, SegmentList* list);
Status ToRotation(const char* op, const F32& inv_freq, std::int32_t interleaved, std::int64_t num_layers,
                  std::int64_t head_dim, Rotation* rotation);
// Checks that there is one value for each slot.
Status CheckPerSlot(const char* op, const S32& slots, const S32& values);
// The view over page arrays [pages, page_size, heads, dim] ("NHD", layout 0) or [pages, heads, page_size, dim] ("HND",
// 1) behind block tables.
Status PageView(const Any& k_pages, const Any& v_pages, const S32& block_tables, std::int32_t kv_layout, KVView* view);

}  // namespace kvpage

#endif  // KVPAGE_FFI_DECODE_H_
