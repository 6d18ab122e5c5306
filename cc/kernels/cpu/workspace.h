// Workspace: the memory that one Attend call needs, kept for the next call.
//
// A process-wide free list lends workspaces, so that in the steady state no call allocates. It only grows: to the
// largest number of calls that ever ran at the same time, each workspace as large as its largest use.
#ifndef KVPAGE_KERNELS_CPU_WORKSPACE_H_
#define KVPAGE_KERNELS_CPU_WORKSPACE_H_

#include <cstdint>
#include <memory>

#include "kernels/cpu/plan.h"

namespace kvpage::cpu {

struct Workspace {
  Plan plan;

  // At least `count` floats on a cache line boundary, uninitialised; null when there is no memory.
  float* Floats(std::int64_t count);

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::unique_ptr<float, Free> floats_;
  std::int64_t capacity_ = 0;
};

// Borrows a workspace until the loan is destroyed.
class WorkspaceLoan {
 public:
  WorkspaceLoan();
  ~WorkspaceLoan();
  WorkspaceLoan(const WorkspaceLoan&) = delete;
  WorkspaceLoan& operator=(const WorkspaceLoan&) = delete;

  Workspace& operator*() { return *workspace_; }

 private:
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_WORKSPACE_H_
