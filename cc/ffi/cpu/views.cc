// check_views: validates what a program's reads of zero-copy views depend on (jax_kvpage/ops/read_views.py). Pools in
// device memory have no views, so CUDA has no such handler.
#include <vector>

#include "ffi/bindings.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"

namespace kvpage {
namespace {

ffi::Error CheckViews(S32 handle, U32 epoch, S32 lengths, ffi::RemainingArgs operands, SpecAttr spec,
                      ffi::Result<ffi::Buffer<ffi::PRED>> checked) {
  static const char* const kOp = "read_views";
  std::shared_ptr<Pool> pool;
  KVPAGE_FFI_RETURN_IF_ERROR(Resolve(kOp, handle, spec, &pool));
  std::vector<views::ViewRef> arrays;
  arrays.reserve(operands.size());
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const ffi::ErrorOr<Any> operand = operands.get<Any>(i);
    if (operand.has_error()) return operand.error();
    arrays.push_back({operand->untyped_data(), static_cast<std::int64_t>(operand->size_bytes())});
  }
  KVPAGE_FFI_RETURN_IF_ERROR(pool->CheckViews(kOp, Cache(handle, epoch, lengths), arrays));
  checked->typed_data()[0] = true;
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kCheckViews, CheckViews, BindCheckViews(ffi::Ffi::Bind()));

}  // namespace

std::vector<Target> ViewTargets() { return {{"jax_kvpage_check_views", kCheckViews}}; }

}  // namespace kvpage
