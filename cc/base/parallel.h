// Parallel: the only interface through which CPU kernels use threads.
//
// The FFI layer implements it with XLA's intra-op thread pool, tests with std::thread or inline. Kernels must give
// bit-identical results for any number of threads and any order of tasks.
#ifndef KVPAGE_BASE_PARALLEL_H_
#define KVPAGE_BASE_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace kvpage {

class Parallel {
 public:
  virtual ~Parallel() = default;
  // Upper bound (exclusive) of the worker indices that For() passes on.
  virtual int num_workers() const = 0;
  // Calls fn(task, worker) once for every task in [0, num_tasks), in any order, and returns when all are done.
  // Concurrent calls of fn never have the same worker index. fn must not throw.
  virtual void For(std::int64_t num_tasks, const std::function<void(std::int64_t task, int worker)>& fn) = 0;
};

// Runs everything on the calling thread.
class Inline final : public Parallel {
 public:
  int num_workers() const override { return 1; }
  void For(std::int64_t num_tasks, const std::function<void(std::int64_t, int)>& fn) override {
    for (std::int64_t task = 0; task < num_tasks; ++task) fn(task, 0);
  }
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_PARALLEL_H_
