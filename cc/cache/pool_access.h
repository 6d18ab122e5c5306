// PoolAccess: gives threads that do not belong to a pool, such as those of a store, access to its parts. It may outlive
// the pool, which calls End first.
#ifndef KVPAGE_CACHE_POOL_ACCESS_H_
#define KVPAGE_CACHE_POOL_ACCESS_H_

#include <mutex>
#include <shared_mutex>

#include "cache/parts.h"

namespace kvpage {

class PoolAccess {
 public:
  explicit PoolAccess(const PoolParts& parts) : parts_(&parts) {}

  // Calls fn(parts); returns false if the pool has ended. Must be called without the pool's locks, and `fn` must not
  // wait for a disk.
  template <class Fn>
  bool With(Fn&& fn) {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    if (parts_ == nullptr) return false;
    fn(*parts_);
    return true;
  }
  // Waits for calls of With that are in progress.
  void End() {
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    parts_ = nullptr;
  }

 private:
  std::shared_mutex mutex_;
  const PoolParts* parts_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_POOL_ACCESS_H_
