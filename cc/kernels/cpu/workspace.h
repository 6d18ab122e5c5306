// Workspace: the memory that one Attend call needs, kept for later calls.
//
// Calls borrow workspaces from a process-wide free list, so that no call allocates in the steady state. The list never
// shrinks: it reaches the largest number of concurrent calls, and each workspace the size of its largest use.
#ifndef KVPAGE_KERNELS_CPU_WORKSPACE_H_
#define KVPAGE_KERNELS_CPU_WORKSPACE_H_

#include <cstdint>
#include <memory>

#include "kernels/cpu/plan.h"

namespace kvpage::cpu {

struct Workspace {
  Plan plan;

  // Returns at least `count` uninitialised floats, aligned to a cache line; null if there is no memory.
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
