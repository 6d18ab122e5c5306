// Patience: host calls that wait for handlers do so in pieces, and ask between two of them whether to go on.
//
// While a piece lasts the gate is closed (Gate): handlers that would pin slots wait, or programs that follow each other
// could keep the call waiting for ever. Between pieces the gate is open and no lock is held, because whoever is asked
// may wait for Python. Each piece is twice as long as the one before, so the wait ends however long handlers run.
#ifndef KVPAGE_CACHE_PATIENCE_H_
#define KVPAGE_CACHE_PATIENCE_H_

#include <functional>
#include <string>
#include <utility>

#include "base/status.h"
#include "cache/slot_table.h"

namespace kvpage {

// Whether a call is to wait on. It is asked with no lock held; empty: always.
using GoOn = std::function<bool()>;

class Patience {
 public:
  explicit Patience(GoOn go_on) : go_on_(std::move(go_on)) {}

  // How long the current piece may last.
  double seconds() const { return seconds_; }
  // Begins the next piece, or is the status of a call that is to wait no longer.
  Status Ask(const char* op) {
    seconds_ *= 2;
    if (!go_on_ || go_on_()) return {};
    return FailedPrecondition(std::string(op) + ": interrupted while it waited for running ops");
  }

 private:
  const GoOn go_on_;
  double seconds_ = 0.05;
};

// While it lives no handler pins slots. Neither of the pool's locks may be held where it begins and ends.
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
