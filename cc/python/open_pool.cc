#include "python/open_pool.h"

#include <utility>

#include "cache/registry.h"
#include "device/device_mirror.h"
#include "device/device_state.h"
#include "ffi/handlers.h"
#include "python/host_backends.h"
#include "vmm/cuda_vmm.h"
#include "vmm/limits.h"
#include "vmm/mappings.h"

namespace kvpage {
namespace {

// Where a pool's memory lies, and the mirror of its table where programs run on a device.
struct PoolMemory {
  std::unique_ptr<Vmm> vmm;
  std::unique_ptr<Mirror> mirror;
  MapAccount* mappings = nullptr;  // null: the memory takes none of the process's
};

Status OnHost(const Geometry& geometry, MakeVmm make, PoolMemory* memory) {
  memory->mappings = &ProcessMapAccount();
  return make(geometry.virtual_bytes(), geometry.block_bytes, &memory->vmm);
}

Status OnCuda(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options, int ordinal,
              MemoryLimit* limit, PoolMemory* memory) {
  if (CudaTargets().empty()) {
    return FailedPrecondition(
        "KVPool: this build of jax_kvpage has no CUDA backend: install it where nvcc is found (JAX_KVPAGE_CUDA=ON), or "
        "pass device=jax.devices('cpu')[0]");
  }
  std::shared_ptr<DeviceState> device;
  KVPAGE_RETURN_IF_ERROR(OpenDevice(ordinal, &device));
  {
    // Here, because a program's first run may be the capture of a graph.
    const ContextScope scope(*device->context());
    KVPAGE_RETURN_IF_ERROR(scope.status());
    KVPAGE_RETURN_IF_ERROR(LoadCudaKernels());
  }
  DeviceDescription description;
  KVPAGE_RETURN_IF_ERROR(DescribeDevice(device->driver(), ordinal, &description));
  *limit = {description.total_bytes, "CUDA device " + std::to_string(ordinal)};
  KVPAGE_RETURN_IF_ERROR(limit->Check("KVPool", capacity_bytes));
  std::unique_ptr<CudaVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(CudaVmm::Make(device->context(), geometry.virtual_bytes(), geometry.block_bytes, &vmm));
  std::unique_ptr<DeviceMirror> mirror;
  KVPAGE_RETURN_IF_ERROR(DeviceMirror::Make(device, geometry, vmm->base(), options, &mirror));
  memory->vmm = std::move(vmm);
  memory->mirror = std::move(mirror);
  return {};
}

}  // namespace

Status MemoryLimit::Check(const std::string& op, std::int64_t capacity_bytes) const {
  if (bytes < 0 || capacity_bytes <= bytes) return {};
  return ResourceExhausted(op + ": capacity is " + std::to_string(capacity_bytes) + " bytes, but " + owner + " has " +
                           std::to_string(bytes) + " bytes of memory in all: give a smaller capacity");
}

Status OpenPool(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes, const PoolOptions& options,
                const std::string& backend, int device, OpenedPool* out) {
  const MakeVmm make_on_host = FindHostBackend(backend);
  if (make_on_host == nullptr && backend != "cuda") {
    return InvalidArgument("KVPool: this build has no backend '" + backend + "': it must be 'cpu' or 'cuda'");
  }
  Geometry geometry;
  KVPAGE_RETURN_IF_ERROR(Geometry::Make(spec, block_bytes, &geometry));
  PoolMemory memory;
  if (backend == "cuda") {
    KVPAGE_RETURN_IF_ERROR(OnCuda(geometry, capacity_bytes, options, device, &out->memory, &memory));
  } else {
    out->memory = {MemoryLimitBytes(), "this machine (or this process's cgroup)"};
    KVPAGE_RETURN_IF_ERROR(out->memory.Check("KVPool", capacity_bytes));
    KVPAGE_RETURN_IF_ERROR(OnHost(geometry, make_on_host, &memory));
  }
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Pool::Make(geometry, capacity_bytes, options, std::move(memory.vmm), memory.mappings, &pool,
                                    std::move(memory.mirror)));
  Register(pool);
  if (pool->mirrored()) {
    Status status = pool->OpenMirror();
    if (status.ok() && device_tables_wanted(pool->device())) status = pool->OpenTable();
    if (!status.ok()) {
      Unregister(pool->id());
      return status;
    }
  }
  out->pool = std::move(pool);
  return {};
}

}  // namespace kvpage
