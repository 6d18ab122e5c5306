#include "ffi/cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace kvpage {
namespace {

// Outlives the call, because a helper may start after all work is done.
struct Work {
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};
  std::atomic<int> workers{1};  // 0 is the caller
  std::int64_t num_tasks = 0;
  const std::function<void(std::int64_t, int)>* fn = nullptr;  // valid while done < num_tasks

  void Drain(int worker) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      (*fn)(task, worker);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

}  // namespace

void XlaParallel::For(std::int64_t num_tasks, const std::function<void(std::int64_t, int)>& fn) {
  const std::int64_t helpers = std::min<std::int64_t>(num_workers_, num_tasks) - 1;
  if (helpers <= 0) {
    for (std::int64_t task = 0; task < num_tasks; ++task) fn(task, 0);
    return;
  }
  auto work = std::make_shared<Work>();
  work->num_tasks = num_tasks;
  work->fn = &fn;
  for (std::int64_t i = 0; i < helpers; ++i) {
    pool_->Schedule([work] { work->Drain(work->workers.fetch_add(1, std::memory_order_relaxed)); });
  }
  work->Drain(0);
  // The remaining tasks run on other threads and end within the time of one task.
  for (int spins = 0; work->done.load(std::memory_order_acquire) < num_tasks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace kvpage
