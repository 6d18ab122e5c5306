// Opening a pool: memory and mirror for a backend, a pool over them, its entry in the registry.
#ifndef KVPAGE_PYTHON_OPEN_POOL_H_
#define KVPAGE_PYTHON_OPEN_POOL_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "cache/pool.h"

namespace kvpage {

// What the machine, its cgroup or the device has in all: no pool may have more capacity.
struct MemoryLimit {
  std::int64_t bytes = -1;  // -1: unknown
  std::string owner;        // in words

  Status Check(const std::string& op, std::int64_t capacity_bytes) const;
};

struct OpenedPool {
  std::shared_ptr<Pool> pool;
  MemoryLimit memory;
};

// `backend`: "cpu"; "cuda" on the device with this ordinal; "fake" for CUDA's memory management over the fake driver,
// with programs that run on CPU.
Status OpenPool(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes, const PoolOptions& options,
                const std::string& backend, int device, OpenedPool* out);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_OPEN_POOL_H_
