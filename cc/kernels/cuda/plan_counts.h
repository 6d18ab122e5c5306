// The head of a plan (work.cuh): what checks and kernels ask of it first.
#ifndef KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_
#define KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_

#include <cstdint>

namespace kvpage::cuda {

// What the planner found.
struct PlanCounts {
  std::int32_t decode;       // number of decode sequences
  std::int32_t prefill;      // number of prefill sequences
  std::int32_t items;        // work items of prefill
  std::int32_t split;        // whether items are single spans, not whole units
  std::int32_t groups;       // sequences with a common beginning (PrefixGroup)
  std::int32_t group_items;  // work items of these, per KV head
  std::int32_t pool;         // whose runs the groups were found in
  std::uint32_t run_cuts;    // DevicePool::run_cuts at that time
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PLAN_COUNTS_H_
