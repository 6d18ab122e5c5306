// The head of a plan (work.cuh), which checks and kernels read first.
#ifndef KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_
#define KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_

#include <cstdint>

namespace kvpage::cuda {

// Results of the planner.
struct PlanCounts {
  std::int32_t decode;       // number of decode sequences
  std::int32_t prefill;      // number of prefill sequences
  std::int32_t items;        // work items of prefill
  std::int32_t split;        // items are single spans, not whole units
  std::int32_t groups;       // number of PrefixGroups, which are sequences with a common prefix
  std::int32_t group_items;  // work items of the groups, per KV head
  std::int32_t pool;         // the pool in whose runs the groups were found
  std::uint32_t run_cuts;    // DevicePool::run_cuts at that time
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_
