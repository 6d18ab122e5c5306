// The Python object's hold on its pool, and calls through it.
#ifndef KVPAGE_PYTHON_POOL_REFERENCE_H_
#define KVPAGE_PYTHON_POOL_REFERENCE_H_

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "cache/messages.h"
#include "cache/pool.h"
#include "cache/process.h"
#include "cache/registry.h"
#include "python/errors.h"
#include "python/gil.h"
#include "python/open_pool.h"

namespace kvpage {

using PoolPtr = std::shared_ptr<Pool>;

// Keeps a pool forever: destroying it in a forked child could wait for a lock that nobody will release.
inline void Leak(PoolPtr pool) { static_cast<void>(new PoolPtr(std::move(pool))); }

// The reference of a Python object to its pool, until it is closed.
class PoolReference {
 public:
  explicit PoolReference(OpenedPool opened)
      : id_(opened.pool->id()), memory_(std::move(opened.memory)), pool_(std::move(opened.pool)) {}
  ~PoolReference() {
    static_cast<void>(Close({}));
    if (!here()) Leak(std::move(pool_));
  }
  PoolReference(const PoolReference&) = delete;
  PoolReference& operator=(const PoolReference&) = delete;

  std::int32_t id() const { return id_; }
  const MemoryLimit& memory() const { return memory_; }
  bool closed() const { return closed_.load(); }
  // Returns the pool if it is open and belongs to this process. Takes no lock in a forked child, because another thread
  // may have held it at the fork.
  Status Get(const char* op, PoolPtr* out) const {
    if (!here()) return closed() ? messages::Closed(op, id_) : Pool::OtherProcess(op, id_);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed()) return messages::Closed(op, id_);
    *out = pool_;
    return {};
  }
  // Waits for running handlers. Programs queued after it fail with an error that names the pool. Safe to call again.
  Status Close(const GoOn& go_on) {
    if (!here()) return {};
    PoolPtr pool;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      pool = pool_;
    }
    if (pool == nullptr) return {};
    KVPAGE_RETURN_IF_ERROR(pool->Close(go_on));
    Unregister(id_);
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.reset();  // `pool` is destroyed after the lock is released
    return {};
  }

 private:
  bool here() const { return ForkCount() == fork_count_; }

  const int fork_count_ = ForkCount();
  const std::int32_t id_;
  const MemoryLimit memory_;
  std::atomic<bool> closed_{false};
  mutable std::mutex mutex_;
  PoolPtr pool_;
};

// Calls fn(pool) without the GIL, if the pool is open and belongs to this process; a failed status becomes a
// StatusError. `op` is the start of messages.
template <class Fn>
auto Call(const PoolReference& self, const char* op, Fn&& fn) {
  const GilRelease release;
  PoolPtr pool;
  Raise(self.Get(op, &pool));
  if constexpr (std::is_same_v<decltype(fn(pool)), Status>) {
    Raise(fn(pool));
  } else {
    return fn(pool);
  }
}

// Calls wait(go_on), which waits for programs, without the GIL. An exception in a signal handler ends the wait.
template <class Wait>
void Interruptibly(Wait&& wait) {
  Status status;
  bool interrupted = false;
  {
    GilRelease release;
    status = wait([&] { return !(interrupted = !release.CheckSignals()); });
  }
  if (interrupted) throw nanobind::python_error();
  Raise(status);
}

// Like Interruptibly, with the pool, which must be open and belong to this process.
template <class Wait>
void WaitOn(const PoolReference& self, const char* op, Wait&& wait) {
  Interruptibly([&](const GoOn& go_on) -> Status {
    PoolPtr pool;
    KVPAGE_RETURN_IF_ERROR(self.Get(op, &pool));
    return wait(pool, go_on);
  });
}

// Turns a method of the pool into a method of the Python object.
template <class Result, class... Args>
auto Method(const char* op, Result (Pool::*method)(Args...)) {
  return [op, method](const PoolReference& self, const std::decay_t<Args>&... args) {
    return Call(self, op, [&](const PoolPtr& pool) { return (pool.get()->*method)(args...); });
  };
}

// The same for a method whose last parameter receives the result: Status (Args..., Out*).
template <class Out, class... Args, class PoolMethod>
auto Getter(const char* op, PoolMethod method) {
  return [op, method](const PoolReference& self, const std::decay_t<Args>&... args) {
    Out out{};
    Call(self, op, [&](const PoolPtr& pool) { return (pool.get()->*method)(args..., &out); });
    return out;
  };
}

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_POOL_REFERENCE_H_
