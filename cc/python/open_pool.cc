#include "python/open_pool.h"

#include <utility>

#include "cache/registry.h"
#include "device/device_mirror.h"
#include "device/device_state.h"
#include "python/host_backends.h"
#include "vmm/cuda_vmm.h"
#include "vmm/limits.h"
#include "vmm/mappings.h"

namespace kvpage {
namespace {

// The memory of a pool, and the mirror of its table if programs run on a device.
struct PoolMemory {
  std::unique_ptr<Vmm> vmm;
  std::unique_ptr<Mirror> mirror;
  MapAccount* mappings = nullptr;  // null: the memory uses no mappings of the process
};

Status OnHost(const Geometry& geometry, MakeVmm make, int device, PoolMemory* memory) {
  memory->mappings = &ProcessMapAccount();
  return make(device, geometry.virtual_bytes(), geometry.block_bytes, &memory->vmm);
}

Status OnDevice(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options, OpenDeviceState open,
                int ordinal, MemoryLimit* limit, PoolMemory* memory) {
  std::shared_ptr<DeviceState> device;
  KVPAGE_RETURN_IF_ERROR(open(ordinal, &device));
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
  const OpenDeviceState open_device = FindDeviceBackend(backend);
  if (make_on_host == nullptr && open_device == nullptr) {
    return InvalidArgument("KVPool: this build has no backend '" + backend + "': it must be 'cpu' or 'cuda'");
  }
  Geometry geometry;
  KVPAGE_RETURN_IF_ERROR(Geometry::Make(spec, block_bytes, &geometry));
  PoolMemory memory;
  if (open_device != nullptr) {
    KVPAGE_RETURN_IF_ERROR(OnDevice(geometry, capacity_bytes, options, open_device, device, &out->memory, &memory));
  } else {
    out->memory = {MemoryLimitBytes(), "this machine (or this process's cgroup)"};
    KVPAGE_RETURN_IF_ERROR(out->memory.Check("KVPool", capacity_bytes));
    KVPAGE_RETURN_IF_ERROR(OnHost(geometry, make_on_host, device, &memory));
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
