#include "python/host_backends.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "ffi/handlers.h"
#include "vmm/cuda_context.h"
#include "vmm/memfd_vmm.h"

namespace kvpage {
namespace {

Status MakeMemfdVmm(int, std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out) {
  std::unique_ptr<MemfdVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(MemfdVmm::Make(virtual_bytes, block_bytes, &vmm));
  *out = std::move(vmm);
  return {};
}

std::map<std::string, MakeVmm>& Backends() {
  static auto* const backends = new std::map<std::string, MakeVmm>{{"cpu", &MakeMemfdVmm}};
  return *backends;
}

// Kernels are loaded here because a program may be captured into a graph on its first run.
Status OpenCuda(int ordinal, std::shared_ptr<DeviceState>* out) {
  if (CudaTargets().empty()) {
    return FailedPrecondition(
        "KVPool: this build of jax_kvpage has no CUDA backend: install it where nvcc is found (JAX_KVPAGE_CUDA=ON), or "
        "pass device=jax.devices('cpu')[0]");
  }
  KVPAGE_RETURN_IF_ERROR(OpenDevice(ordinal, out));
  const ContextScope scope(*(*out)->context());
  KVPAGE_RETURN_IF_ERROR(scope.status());
  return LoadCudaKernels();
}

std::map<std::string, OpenDeviceState>& DeviceBackends() {
  static auto* const backends = new std::map<std::string, OpenDeviceState>{{"cuda", &OpenCuda}};
  return *backends;
}

}  // namespace

void RegisterDeviceBackend(const std::string& name, OpenDeviceState open) { DeviceBackends()[name] = open; }

OpenDeviceState FindDeviceBackend(const std::string& name) {
  const auto found = DeviceBackends().find(name);
  return found == DeviceBackends().end() ? nullptr : found->second;
}

void RegisterHostBackend(const std::string& name, MakeVmm make) { Backends()[name] = make; }

MakeVmm FindHostBackend(const std::string& name) {
  const auto found = Backends().find(name);
  return found == Backends().end() ? nullptr : found->second;
}

}  // namespace kvpage
