// Watcher: a thread that polls for events that are not announced, such as marks that programs on a device leave in
// memory.
#ifndef KVPAGE_STORE_WATCHER_H_
#define KVPAGE_STORE_WATCHER_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kvpage::store {

class Watcher {
 public:
  using Poll = std::function<bool()>;

  Watcher() = default;
  ~Watcher() { Stop(); }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  // Calls `poll` until it returns true or Stop is called. The first call starts the thread, and throws if the system
  // has no more threads.
  void Add(Poll poll) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stopped_) return;
      if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
      added_.push_back(std::move(poll));
    }
    changed_.notify_all();
  }
  // Waits for a poll in progress.
  void Stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  // The intervals grow while nothing happens.
  static constexpr std::chrono::microseconds kShortest{50}, kLongest{2000};

  void Run() {
    std::vector<Poll> polls;
    std::chrono::microseconds pause = kShortest;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      const auto come = [&] { return stopped_ || !added_.empty(); };
      if (polls.empty()) {
        changed_.wait(lock, come);
      } else {
        changed_.wait_for(lock, pause, come);
      }
      if (stopped_) return;
      if (!added_.empty()) pause = kShortest;
      std::move(added_.begin(), added_.end(), std::back_inserter(polls));
      added_.clear();
      lock.unlock();
      const auto done = std::remove_if(polls.begin(), polls.end(), [](const Poll& poll) { return poll(); });
      pause = done == polls.end() ? std::min(2 * pause, kLongest) : kShortest;
      polls.erase(done, polls.end());  // what they hold is destroyed without the lock
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::vector<Poll> added_;
  std::thread thread_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_WATCHER_H_
