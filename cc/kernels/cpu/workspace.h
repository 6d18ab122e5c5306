// Workspace: the memory that one Attend call needs, kept for the next call.
//
// A process-wide free list hands out workspaces and takes them back, so that in the steady state no
// call allocates. It only grows: as many workspaces as calls ever ran at the same time, each as large as its largest
// use.
#ifndef KVPAGE_KERNELS_CPU_WORKSPACE_H_
#define KVPAGE_KERNELS_CPU_WORKSPACE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cpu/isa.h"

namespace kvpage::cpu {

// A sequence's tile of query rows for one KV head (or several, walked together), over all of its context.
struct Unit {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t heads = 1;
  std::int32_t rows = 0;
  std::int64_t first_row = 0;
  std::int64_t begin = 0;  // positions that any of the rows sees
  std::int64_t end = 0;
  std::int64_t partials = -1;  // where its spans' states start in the workspace; -1 when one task does it all
  std::atomic<std::int32_t> unfinished{0};

  Unit() = default;
  Unit(const Unit& o)
      : sequence(o.sequence),
        kv_head(o.kv_head),
        heads(o.heads),
        rows(o.rows),
        first_row(o.first_row),
        begin(o.begin),
        end(o.end),
        partials(o.partials),
        unfinished(o.unfinished.load(std::memory_order_relaxed)) {}
};

// Spans [span_begin, span_end) of a unit.
struct Task {
  std::int32_t unit = 0;
  std::int32_t span_begin = 0;
  std::int32_t span_end = 0;
};

struct Workspace {
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<std::int32_t> order;

  // At least `count` floats on a cache line boundary, with anything in them; null when there is no memory.
  float* Floats(std::int64_t count);

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::unique_ptr<float, Free> floats_;
  std::int64_t capacity_ = 0;
};

// Borrows a workspace for its own lifetime.
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
