// SharedFaults: what ops have failed with on the devices of a mesh, where an op must not fail.
//
// The devices of a mesh meet in collectives that are the model's own. A device whose op fails leaves its program, and
// the others wait for it until XLA ends the process. It does not help to make all fail together: XLA runs a program's
// independent parts in any order, so one device may have begun a collective that another no longer comes to. So an op
// that must not run does nothing there, returns NaN and succeeds (ffi/cpu/recorded.h), the same as on a GPU. What it
// would have failed with is kept here, once for the pools of all devices. The failed pool's other ops of this
// generation do nothing either, and host calls return the fault until the next generation begins.
#ifndef KVPAGE_CACHE_SHARED_FAULTS_H_
#define KVPAGE_CACHE_SHARED_FAULTS_H_

#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvpage {

class SharedFaults {
 public:
  // `in_calls`: whether all host calls return a fault, or only those that look for it. Where the pools of other
  // processes must get the same calls, one that fails here alone would be taken for a difference.
  explicit SharedFaults(bool in_calls) : in_calls_(in_calls) {}

  // Adds a pool and returns its number. `note` ends its messages.
  std::size_t Join(std::string note);
  // An op has failed. `current`: its cache is of the pool's current generation.
  void Add(std::size_t pool, const Status& fault, bool current);
  // A generation begins in a pool. A fault that no call has returned yet stays for `Take`.
  void StartGeneration(std::size_t pool);
  // What a host call returns: the first fault of the current generation.
  Status Get();
  // What a call that looks for faults returns: the same, or one of an older generation, which are all forgotten then.
  Status Take();
  // What no call has returned yet, of any generation.
  Status Untold();

 private:
  struct Entry {
    std::string note;
    Status fault;       // of the current generation
    bool told = false;  // a call has returned it
    Status late;        // of an older generation
  };

  const bool in_calls_;
  std::atomic<bool> any_{false};
  std::mutex mutex_;  // taken last
  std::vector<Entry> entries_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SHARED_FAULTS_H_
