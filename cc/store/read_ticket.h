// ReadTicket: the progress of a read of stored blocks.
#ifndef KVPAGE_STORE_READ_TICKET_H_
#define KVPAGE_STORE_READ_TICKET_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "store/file_header.h"

namespace kvpage::store {

class ReadTicket {
 public:
  // For `blocks` blocks that are read in `pieces` pieces.
  ReadTicket(std::int64_t blocks, std::int64_t pieces, Problem problem)
      : problem_(problem), good_(blocks), pieces_(pieces) {}

  bool ready() const { return Wait(0); }
  // Waits up to `seconds`; returns whether it is ready.
  bool Wait(double seconds) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return pieces_ == 0; });
  }
  // When it is ready: the number of leading blocks that were read, and why not all. Later blocks may contain anything.
  std::int64_t blocks() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return good_;
  }
  Problem problem() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return problem_;
  }

  // Called when a piece is done. If there was a problem, only the blocks before `good` are valid. Returns whether it
  // was the last piece.
  bool Finish(Problem problem, std::int64_t good) {
    bool last = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (problem != Problem::kNone && good < good_) {
        good_ = good;
        problem_ = problem;
      }
      last = --pieces_ == 0;
    }
    changed_.notify_all();
    return last;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Problem problem_;
  std::int64_t good_;
  std::int64_t pieces_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_READ_TICKET_H_
