// CudaAccess: grants a device access to memory that is mapped in its address space.
#ifndef KVPAGE_VMM_CUDA_ACCESS_H_
#define KVPAGE_VMM_CUDA_ACCESS_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "vmm/cuda_context.h"

namespace kvpage {

// The context is current in every call.
class CudaAccess {
 public:
  // `calls` counts the driver calls.
  CudaAccess(const CudaContext& context, std::atomic<std::int64_t>* calls) : context_(context), calls_(calls) {}
  CudaAccess(const CudaAccess&) = delete;
  CudaAccess& operator=(const CudaAccess&) = delete;

  // The range is made up of whole mappings. Where the driver cannot grant reading alone, `read_only` memory can be
  // written too: programs check what they may write, so this only protects against mistakes in them.
  Status Grant(cu::DevicePtr address, std::int64_t bytes, bool read_only, const std::string& what);

 private:
  const CudaContext& context_;
  std::atomic<std::int64_t>* const calls_;
  bool refused_ = false;  // the driver does not grant reading alone
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_ACCESS_H_
