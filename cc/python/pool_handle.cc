#include "python/pool_handle.h"

#include <string>

#include "cache/messages.h"
#include "cache/registry.h"
#include "device/device_mirror.h"
#include "device/device_state.h"
#include "ffi/handlers.h"
#include "python/host_backends.h"
#include "vmm/cuda_vmm.h"
#include "vmm/limits.h"

namespace kvpage {
namespace {

// What the rest of the process (XLA's threads and buffers, Python) may still want to map.
constexpr std::int64_t kMapReserve = 4096;

std::string OfDevice(int ordinal) { return "CUDA device " + std::to_string(ordinal); }

Status CheckCapacity(const std::string& op, std::int64_t capacity_bytes, std::int64_t limit, const std::string& who) {
  if (limit < 0 || capacity_bytes <= limit) return {};
  return ResourceExhausted(op + ": capacity is " + std::to_string(capacity_bytes) + " bytes, but " + who + " has " +
                           std::to_string(limit) + " bytes of memory in all: give a smaller capacity");
}

// Where a pool's memory lies, and whom it tells of what it decides.
struct PoolMemory {
  std::unique_ptr<Vmm> vmm;
  std::unique_ptr<Mirror> mirror;
  std::int64_t map_limit = 0;
};

Status OnHost(const Geometry& geometry, MakeVmm make, PoolMemory* memory) {
  const std::int64_t map_limit = MaxMapCount() - CurrentMapCount() - kMapReserve;
  memory->map_limit = map_limit > 0 ? map_limit : 1;
  return make(geometry.virtual_bytes(), geometry.block_bytes, &memory->vmm);
}

Status OnCuda(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options, int ordinal,
              PoolMemory* memory, std::int64_t* memory_limit) {
  if (CudaTargets().empty()) {
    return FailedPrecondition(
        "KVPool: this build of jax_kvpage has no CUDA backend: install it where nvcc is found (JAX_KVPAGE_CUDA=ON), or "
        "pass device=jax.devices('cpu')[0]");
  }
  std::shared_ptr<DeviceState> device;
  KVPAGE_RETURN_IF_ERROR(OpenDevice(ordinal, &device));
  DeviceDescription description;
  KVPAGE_RETURN_IF_ERROR(DescribeDevice(device->driver(), ordinal, &description));
  *memory_limit = description.total_bytes;
  KVPAGE_RETURN_IF_ERROR(CheckCapacity("KVPool", capacity_bytes, *memory_limit, OfDevice(ordinal)));
  std::unique_ptr<CudaVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(CudaVmm::Make(device->context(), geometry.virtual_bytes(), geometry.block_bytes, &vmm));
  std::unique_ptr<DeviceMirror> mirror;
  KVPAGE_RETURN_IF_ERROR(DeviceMirror::Make(device, geometry, vmm->base(), options.allow_stale, &mirror));
  memory->vmm = std::move(vmm);
  memory->mirror = std::move(mirror);
  return {};
}

}  // namespace

Status PoolHandle::Open(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes,
                        const PoolOptions& options, const std::string& backend, int device) {
  const MakeVmm make_on_host = FindHostBackend(backend);
  if (make_on_host == nullptr && backend != "cuda") {
    return InvalidArgument("KVPool: this build has no backend '" + backend + "': it must be 'cpu' or 'cuda'");
  }
  Geometry geometry;
  KVPAGE_RETURN_IF_ERROR(Geometry::Make(spec, block_bytes, &geometry));
  PoolMemory memory;
  if (backend == "cuda") {
    KVPAGE_RETURN_IF_ERROR(OnCuda(geometry, capacity_bytes, options, device, &memory, &memory_limit_));
    memory_owner_ = OfDevice(device);
  } else {
    memory_limit_ = MemoryLimitBytes();
    memory_owner_ = "this machine (or this process's cgroup)";
    KVPAGE_RETURN_IF_ERROR(CheckCapacity("KVPool", capacity_bytes, memory_limit_, memory_owner_));
    KVPAGE_RETURN_IF_ERROR(OnHost(geometry, make_on_host, &memory));
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
  id_ = pool->id();
  pool_ = std::move(pool);
  return {};
}

std::shared_ptr<Pool> PoolHandle::Get() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return pool_;
}

Status PoolHandle::Use(const char* op, std::shared_ptr<Pool>* out) const {
  *out = Get();
  if (*out == nullptr) return messages::Closed(op, id_);
  return (*out)->CheckProcess(op);
}

Claim PoolHandle::Acquire(const std::vector<std::int64_t>& tokens) {
  Claim claim;
  std::shared_ptr<Pool> pool;
  claim.status = Use("acquire", &pool);
  return claim.status.ok() ? pool->Acquire(tokens) : claim;
}

Claim PoolHandle::Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
  Claim claim;
  std::shared_ptr<Pool> pool;
  claim.status = Use("extend", &pool);
  return claim.status.ok() ? pool->Extend(slots, tokens) : claim;
}

Status PoolHandle::StartRelease(const std::vector<std::int32_t>& slots) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("release", &pool));
  return pool->StartRelease(slots);
}

void PoolHandle::UndoAcquire(const std::vector<std::int32_t>& slots) {
  std::shared_ptr<Pool> pool;
  if (Use("acquire", &pool).ok()) pool->UndoAcquire(slots);
}

void PoolHandle::UndoRelease(const std::vector<std::int32_t>& slots) {
  std::shared_ptr<Pool> pool;
  if (Use("release", &pool).ok()) pool->UndoRelease(slots);
}

Status PoolHandle::Commit(std::int32_t slot, std::int64_t num_tokens) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("commit", &pool));
  return pool->Commit(slot, num_tokens);
}

Status PoolHandle::NewGeneration(Pool::Generation* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("cache", &pool));
  return pool->NewGeneration(out);
}

Status PoolHandle::TakeFault() {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("check", &pool));
  return pool->TakeFault();
}

bool PoolHandle::WaitForDrain(double seconds) {
  std::shared_ptr<Pool> pool;
  return Use("acquire", &pool).ok() && pool->WaitForDrain(seconds);
}

Status PoolHandle::Trim(std::int64_t* freed_blocks) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("trim", &pool));
  return pool->Trim(freed_blocks);
}

Claim PoolHandle::Resize(std::int64_t capacity_bytes) {
  Claim claim;
  std::shared_ptr<Pool> pool;
  claim.status = Use("resize", &pool);
  if (claim.status.ok()) claim.status = CheckCapacity("resize", capacity_bytes, memory_limit_, memory_owner_);
  return claim.status.ok() ? pool->Resize(capacity_bytes) : claim;
}

Status PoolHandle::Numbers(PoolNumbers* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("stats", &pool));
  *out = pool->Numbers();
  return {};
}

Status PoolHandle::Rows(std::vector<SlotRow>* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("slot_table", &pool));
  *out = pool->Rows();
  return {};
}

Status PoolHandle::BlockMap(std::int32_t slot, std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("block_map", &pool));
  return pool->BlockMap(slot, out);
}

Status PoolHandle::View(std::int64_t layer, std::int32_t slot, std::shared_ptr<PoolView>* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("view", &pool));
  KVPAGE_RETURN_IF_ERROR(pool->AddView(layer, slot));
  *out = std::make_shared<PoolView>(std::move(pool), slot);
  return {};
}

void PoolHandle::Close() {
  std::shared_ptr<Pool> pool;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    pool.swap(pool_);
  }
  if (pool == nullptr || !pool->CheckProcess("close").ok()) return;
  pool->Close();
  Unregister(id_);
}

}  // namespace kvpage
