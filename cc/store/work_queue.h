// WorkQueue: a FIFO queue of items for its own threads, with a limit in bytes.
#ifndef KVPAGE_STORE_WORK_QUEUE_H_
#define KVPAGE_STORE_WORK_QUEUE_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kvpage::store {

template <class Item>
class WorkQueue {
 public:
  // Items count until their work is done, up to a total of `most_bytes`. If the queue is empty it accepts one larger
  // item.
  WorkQueue(int threads, std::int64_t most_bytes, std::function<void(Item&)> work)
      : most_bytes_(most_bytes), work_(std::move(work)) {
    try {
      for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
    } catch (...) {  // the system has no more threads
      static_cast<void>(Stop());
      throw;
    }
  }
  ~WorkQueue() { static_cast<void>(Stop()); }
  WorkQueue(const WorkQueue&) = delete;
  WorkQueue& operator=(const WorkQueue&) = delete;

  // Never waits. Returns false, and leaves the item alone, if the queue is full or stopped.
  bool Offer(Item& item, std::int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stopped_ || !Fits(bytes)) return false;
      bytes_ += bytes;
      items_.push_back({std::move(item), bytes});
    }
    changed_.notify_all();
    return true;
  }
  // Waits up to `seconds`; returns whether an item of this size fits. A stopped queue accepts none.
  bool WaitForRoom(std::int64_t bytes, double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    return Wait(lock, seconds, [&] { return stopped_ || Fits(bytes); }) && !stopped_;
  }
  std::int64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }
  // Waits for items in progress. Returns the items that have not been started.
  std::vector<Item> Stop() {
    std::vector<Item> left;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
      for (Entry& entry : items_) left.push_back(std::move(entry.item));
      items_.clear();
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
    return left;
  }

 private:
  struct Entry {
    Item item;
    std::int64_t bytes;
  };

  bool Fits(std::int64_t bytes) const { return bytes_ == 0 || bytes <= most_bytes_ - bytes_; }

  template <class Condition>
  bool Wait(std::unique_lock<std::mutex>& lock, double seconds, const Condition& condition) {
    return changed_.wait_for(lock, std::chrono::duration<double>(seconds), condition);
  }

  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopped_ || !items_.empty(); });
      if (stopped_) return;
      Entry entry = std::move(items_.front());
      items_.pop_front();
      lock.unlock();
      work_(entry.item);
      const std::int64_t bytes = entry.bytes;
      {
        const Item gone = std::move(entry.item);
      }  // what the item holds is destroyed before its bytes are released
      lock.lock();
      bytes_ -= bytes;
      changed_.notify_all();
    }
  }

  const std::int64_t most_bytes_;
  const std::function<void(Item&)> work_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> items_;
  std::int64_t bytes_ = 0;
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_WORK_QUEUE_H_
