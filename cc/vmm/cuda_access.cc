#include "vmm/cuda_access.h"

namespace kvpage {

Status CudaAccess::Grant(cu::DevicePtr address, std::int64_t bytes, bool read_only, const std::string& what) {
  cu::AccessDesc access;
  access.location.id = context_.device();
  const auto grant = [&](cu::Access flags) {
    access.access = flags;
    calls_->fetch_add(1, std::memory_order_relaxed);
    return context_.driver().MemSetAccess(address, static_cast<std::size_t>(bytes), &access, 1);
  };
  cu::Result result = grant(read_only && !refused_ ? cu::Access::kRead : cu::Access::kReadWrite);
  const bool no_read_only = result == cu::Result::kNotSupported || result == cu::Result::kInvalidValue;
  if (read_only && !refused_ && no_read_only) {
    result = grant(cu::Access::kReadWrite);
    refused_ = result == cu::Result::kSuccess;
  }
  if (result == cu::Result::kSuccess) return {};
  return context_.driver().Explain(result, cu::Call::kMemSetAccess, what);
}

}  // namespace kvpage
