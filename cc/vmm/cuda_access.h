// CudaAccess: grants a device access to memory mapped in its address space.
#ifndef KVPAGE_VMM_CUDA_ACCESS_H_
#define KVPAGE_VMM_CUDA_ACCESS_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "vmm/cuda_context.h"

namespace kvpage {

// The context must be current in every call.
class CudaAccess {
 public:
  // `calls` counts the driver calls.
  CudaAccess(const CudaContext& context, std::atomic<std::int64_t>* calls) : context_(context), calls_(calls) {}
  CudaAccess(const CudaAccess&) = delete;
  CudaAccess& operator=(const CudaAccess&) = delete;

  // The range must consist of complete mappings. If the driver cannot grant read-only access, `read_only` memory is
  // writable too: programs check what they may write, so this only guards against bugs in them.
  Status Grant(cu::DevicePtr address, std::int64_t bytes, bool read_only, const std::string& what);

 private:
  const CudaContext& context_;
  std::atomic<std::int64_t>* const calls_;
  bool refused_ = false;  // the driver cannot grant read-only access
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_ACCESS_H_
