#include "python/open_pool.h"

#include <utility>

#include "cache/registry.h"
#include "device/device_mirror.h"
#include "device/device_state.h"
#include "ffi/handlers.h"
#include "python/cuda_binding.h"
#include "vmm/cuda_vmm.h"
#include "vmm/limits.h"
#include "vmm/memfd_vmm.h"

namespace kvpage {
namespace {

// Mappings left to the rest of the process: XLA's threads and buffers, Python.
constexpr std::int64_t kMapReserve = 4096;

// Where a pool's memory lies, and the mirror of its table where programs run on a device.
struct PoolMemory {
  std::unique_ptr<Vmm> vmm;
  std::unique_ptr<Mirror> mirror;
  std::int64_t map_limit = 0;
};

Status OnHost(const Geometry& geometry, bool fake, PoolMemory* memory) {
  const std::int64_t map_limit = MaxMapCount() - CurrentMapCount() - kMapReserve;
  memory->map_limit = map_limit > 0 ? map_limit : 1;
  if (fake) return MakeFakeVmm(geometry.virtual_bytes(), geometry.block_bytes, &memory->vmm);
  std::unique_ptr<MemfdVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(MemfdVmm::Make(geometry.virtual_bytes(), geometry.block_bytes, &vmm));
  memory->vmm = std::move(vmm);
  return {};
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
  DeviceDescription description;
  KVPAGE_RETURN_IF_ERROR(DescribeDevice(device->driver(), ordinal, &description));
  *limit = {description.total_bytes, "CUDA device " + std::to_string(ordinal)};
  KVPAGE_RETURN_IF_ERROR(limit->Check("KVPool", capacity_bytes));
  std::unique_ptr<CudaVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(CudaVmm::Make(device->context(), geometry.virtual_bytes(), geometry.block_bytes, &vmm));
  std::unique_ptr<DeviceMirror> mirror;
  KVPAGE_RETURN_IF_ERROR(DeviceMirror::Make(device, geometry, vmm->base(), options.allow_stale, &mirror));
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
  if (backend != "cpu" && backend != "cuda" && backend != "fake") {
    return InvalidArgument("KVPool: backend must be 'cpu', 'cuda' or 'fake', got '" + backend + "'");
  }
  Geometry geometry;
  KVPAGE_RETURN_IF_ERROR(Geometry::Make(spec, block_bytes, &geometry));
  PoolMemory memory;
  if (backend == "cuda") {
    KVPAGE_RETURN_IF_ERROR(OnCuda(geometry, capacity_bytes, options, device, &out->memory, &memory));
  } else {
    out->memory = {MemoryLimitBytes(), "this machine (or this process's cgroup)"};
    KVPAGE_RETURN_IF_ERROR(out->memory.Check("KVPool", capacity_bytes));
    KVPAGE_RETURN_IF_ERROR(OnHost(geometry, backend == "fake", &memory));
  }
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Pool::Make(geometry, capacity_bytes, options, std::move(memory.vmm), memory.map_limit, &pool,
                                    std::move(memory.mirror)));
  Register(pool);
  if (pool->mirrored()) {
    if (Status status = pool->OpenMirror(); !status.ok()) {
      Unregister(pool->id());
      return status;
    }
  }
  out->pool = std::move(pool);
  return {};
}

}  // namespace kvpage
