// Opens a pool: creates the memory and mirror for a backend and a pool over them, and registers the pool.
#ifndef KVPAGE_PYTHON_OPEN_POOL_H_
#define KVPAGE_PYTHON_OPEN_POOL_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "cache/pool.h"

namespace kvpage {

// The total memory of the machine, its cgroup or the device: the upper limit of a pool's capacity.
struct MemoryLimit {
  std::int64_t bytes = -1;  // -1: unknown
  std::string owner;        // as text

  Status Check(const std::string& op, std::int64_t capacity_bytes) const;
};

struct OpenedPool {
  std::shared_ptr<Pool> pool;
  MemoryLimit memory;
};

// `backend`: "cuda" on the device with this ordinal, or a host backend (host_backends.h), with programs on CPU.
Status OpenPool(const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes, const PoolOptions& options,
                const std::string& backend, int device, OpenedPool* out);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_OPEN_POOL_H_
