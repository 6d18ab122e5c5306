// PoolHandle: what the Python pool object holds. It opens a pool, refuses calls on a closed pool or in a forked
// child, and ties zero-copy views to the pool's memory.
#ifndef KVPAGE_PYTHON_POOL_HANDLE_H_
#define KVPAGE_PYTHON_POOL_HANDLE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cache/pool.h"

namespace kvpage {

// While it lives the arena stays mapped and the slot is not handed on.
struct PoolView {
  PoolView(std::shared_ptr<Pool> p, std::int32_t s) : pool(std::move(p)), slot(s) {}
  ~PoolView() { pool->RemoveView(slot); }
  PoolView(const PoolView&) = delete;
  PoolView& operator=(const PoolView&) = delete;
  const std::shared_ptr<Pool> pool;
  const std::int32_t slot;
};

class PoolHandle {
 public:
  PoolHandle() = default;
  ~PoolHandle() { Close(); }
  PoolHandle(const PoolHandle&) = delete;
  PoolHandle& operator=(const PoolHandle&) = delete;

  // `backend`: "cuda" on the device with this ordinal, or a host backend (host_backends.h), with programs on CPU.
  Status Open(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes, const PoolOptions& options,
              const std::string& backend, int device);
  std::int32_t id() const { return id_; }
  bool closed() const { return Get() == nullptr; }

  Claim Acquire(const std::vector<std::int64_t>& tokens);
  Claim Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens);
  Status StartRelease(const std::vector<std::int32_t>& slots);
  void UndoAcquire(const std::vector<std::int32_t>& slots);
  void UndoRelease(const std::vector<std::int32_t>& slots);
  Status Commit(std::int32_t slot, std::int64_t num_tokens);
  Status NewGeneration(Pool::Generation* out);
  Status TakeFault();
  bool WaitForDrain(double seconds);
  Status Trim(std::int64_t* freed_blocks);
  Claim Resize(std::int64_t capacity_bytes);
  Status Numbers(PoolNumbers* out);
  Status Rows(std::vector<SlotRow>* out);
  Status BlockMap(std::int32_t slot, std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>* out);
  Status View(std::int64_t layer, std::int32_t slot, std::shared_ptr<PoolView>* out);
  // Waits for running handlers. Programs queued behind it fail and name the pool. Safe to call again.
  void Close();

 private:
  std::shared_ptr<Pool> Get() const;
  Status Use(const char* op, std::shared_ptr<Pool>* out) const;

  mutable std::mutex mutex_;
  std::shared_ptr<Pool> pool_;
  std::int32_t id_ = -1;
  std::int64_t memory_limit_ = -1;  // of the machine or the device; -1: unknown
  std::string memory_owner_;        // in words
};

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_POOL_HANDLE_H_
