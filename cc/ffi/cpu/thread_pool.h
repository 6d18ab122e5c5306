// XlaParallel: the Parallel interface of the kernels over XLA's intra-op thread pool.
//
// The calling thread works too and waits only for tasks that another thread has already started, so it cannot deadlock
// on a pool that has one thread or is busy with other programs: late helpers find no tasks left.
#ifndef KVPAGE_FFI_CPU_THREAD_POOL_H_
#define KVPAGE_FFI_CPU_THREAD_POOL_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace kvpage {

class XlaParallel final : public Parallel {
 public:
  explicit XlaParallel(xla::ffi::ThreadPool* pool)
      : pool_(pool), num_workers_(pool != nullptr ? std::max<int>(1, static_cast<int>(pool->num_threads())) : 1) {}

  int num_workers() const override { return num_workers_; }
  void For(std::int64_t num_tasks, const std::function<void(std::int64_t, int)>& fn) override;

 private:
  xla::ffi::ThreadPool* const pool_;  // null: the calling thread alone
  const int num_workers_;
};

}  // namespace kvpage

#endif  // KVPAGE_FFI_CPU_THREAD_POOL_H_
