// SharedFaults: records the errors of ops on the devices of a mesh, where an op must not fail its program.
//
// The devices of a mesh meet in collectives of the user's model. If an op fails, its device leaves the program, and the
// others wait for it until XLA ends the process. Making all devices fail together does not help: XLA runs independent
// parts of a program in any order, so one device may already wait in a collective that another will never reach. So an
// op that must not run does nothing, returns NaN and succeeds (ffi/cpu/recorded.h), the same as on a GPU. Its error is
// kept here, once for the pools of all devices. All later ops of the failed pool in this generation do nothing either,
// and host calls return the error until the next generation begins.
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
  // `in_calls`: whether all host calls return a fault, or only those that ask for it. If the pools of other processes
  // must get the same calls, a call that fails in one process only would count as a divergence.
  explicit SharedFaults(bool in_calls) : in_calls_(in_calls) {}

  // Adds a pool and returns its number. `note` is appended to its messages.
  std::size_t Join(std::string note);
  // Records a failed op. `current`: whether its cache belongs to the pool's current generation.
  void Add(std::size_t pool, const Status& fault, bool current);
  // A new generation begins in a pool. A fault that no call has returned yet is kept for Take.
  void StartGeneration(std::size_t pool);
  // The fault that host calls return: the first one of the current generation.
  Status Get();
  // The same for calls that ask for faults. Falls back to a fault of an older generation; forgets all of those.
  Status Take();
  // A fault of any generation that no call has returned yet.
  Status Untold();

 private:
  struct Entry {
    std::string note;
    Status fault;       // in the current generation
    bool told = false;  // whether a call has returned it
    Status late;        // from an older generation
  };

  const bool in_calls_;
  std::atomic<bool> any_{false};
  std::mutex mutex_;  // always acquired last
  std::vector<Entry> entries_;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SHARED_FAULTS_H_
