#include "python/pool_handle.h"

#include <string>

#include "cache/messages.h"
#include "cache/registry.h"
#include "python/cuda_binding.h"
#include "vmm/limits.h"
#include "vmm/memfd_vmm.h"

namespace kvpage {
namespace {

// What the rest of the process (XLA's threads and buffers, Python) may still want to map.
constexpr std::int64_t kMapReserve = 4096;

Status CheckCapacity(const char* op, std::int64_t capacity_bytes) {
  const std::int64_t limit = MemoryLimitBytes();
  if (limit < 0 || capacity_bytes <= limit) return {};
  return ResourceExhausted(std::string(op) + ": capacity is " + std::to_string(capacity_bytes) +
                           " bytes, but this machine (or this process's cgroup) has " + std::to_string(limit) +
                           " bytes of memory in all: give a smaller capacity");
}

}  // namespace

Status PoolHandle::Open(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes,
                        const PoolOptions& options, const std::string& backend, int device) {
  static_cast<void>(device);
  if (backend != "cpu" && backend != "fake") {
    return InvalidArgument("KVPool: there is no backend '" + backend + "' in this build");
  }
  Geometry geometry;
  KVPAGE_RETURN_IF_ERROR(Geometry::Make(spec, block_bytes, &geometry));
  KVPAGE_RETURN_IF_ERROR(CheckCapacity("KVPool", capacity_bytes));
  std::unique_ptr<Vmm> vmm;
  if (backend == "fake") {
    KVPAGE_RETURN_IF_ERROR(MakeFakeVmm(geometry.virtual_bytes(), block_bytes, &vmm));
  } else {
    std::unique_ptr<MemfdVmm> memfd;
    KVPAGE_RETURN_IF_ERROR(MemfdVmm::Make(geometry.virtual_bytes(), block_bytes, &memfd));
    vmm = std::move(memfd);
  }
  const std::int64_t map_limit = MaxMapCount() - CurrentMapCount() - kMapReserve;
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(
      Pool::Make(geometry, capacity_bytes, options, std::move(vmm), map_limit > 0 ? map_limit : 1, &pool));
  Register(pool);
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
  if (*out == nullptr) {
    return messages::Closed(op, id_);
  }
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

Status PoolHandle::NewLine(Pool::Line* out) {
  std::shared_ptr<Pool> pool;
  KVPAGE_RETURN_IF_ERROR(Use("cache", &pool));
  return pool->NewLine(out);
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
  if (claim.status.ok()) claim.status = CheckCapacity("resize", capacity_bytes);
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
