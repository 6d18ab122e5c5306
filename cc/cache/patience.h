// Patience: host calls that wait for handlers wait in intervals, and ask between two of them whether to continue.
//
// During an interval the gate is closed (Gate): handlers that would pin slots wait, because otherwise a stream of
// programs could keep the call waiting forever. Between intervals the gate is open and no lock is held, because the
// callback may wait for Python. Each interval is twice as long as the one before, so the wait ends no matter how long
// handlers run.
#ifndef KVPAGE_CACHE_PATIENCE_H_
#define KVPAGE_CACHE_PATIENCE_H_

#include <functional>
#include <string>
#include <utility>

#include "base/status.h"
#include "cache/slot_table.h"

namespace kvpage {

// Returns whether a call should keep waiting. Called with no lock held; if empty, always keep waiting.
using GoOn = std::function<bool()>;

class Patience {
 public:
  explicit Patience(GoOn go_on) : go_on_(std::move(go_on)) {}

  // Length of the current interval.
  double seconds() const { return seconds_; }
  // Begins the next interval, or returns the error of a call that should stop waiting.
  Status Ask(const char* op) {
    seconds_ *= 2;
    if (!go_on_ || go_on_()) return {};
    return FailedPrecondition(std::string(op) + ": interrupted while it waited for running ops");
  }

 private:
  const GoOn go_on_;
  double seconds_ = 0.05;
};

// While it exists, no handler can pin slots. It must be constructed and destroyed without holding the pool's locks.
class Gate {
 public:
  explicit Gate(SlotTable* table) : table_(table) { table_->CloseGate(table_->Lock()); }
  ~Gate() { table_->OpenGate(table_->Lock()); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

 private:
  SlotTable* const table_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PATIENCE_H_
