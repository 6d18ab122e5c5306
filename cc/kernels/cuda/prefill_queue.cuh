// The prefill kernel's queue of work items: whole units, or single spans of them.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_QUEUE_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_QUEUE_CUH_

#include <cstdint>

#include "kernels/cuda/readers.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

struct PrefillItem {
  Sequence sequence;
  std::int32_t head;
  std::int32_t first_row, rows;
  std::int32_t from, to;     // positions
  std::int32_t shift;        // spans are 1 << shift tokens
  bool split;                // the item is one of several spans of a unit
  std::int32_t unit;         // index in CallState::arrived; this and the next three are only set if `split`
  std::int32_t items;        // items of the unit, including empty ones
  std::int32_t first_state;  // first state of the unit, for the sequence's first span
  std::int32_t state;
  std::int32_t first_span, last_span;  // spans that rows of the tile see, counted from the sequence's first span
};

struct PrefillQueue {
  const PlanCounts* counts;
  std::int32_t count;

  __device__ __forceinline__ explicit PrefillQueue(const AttentionParams& p)
      : counts(p.plan.counts), count(p.plan.counts->items) {}

  // Writes the next item to shared memory for the whole block, which has finished the previous one. If there is none,
  // counts the block out (here, because code after the kernel's loop would cost registers) and returns false.
  __device__ __forceinline__ bool Take(const AttentionParams& p, PrefillItem* work) const {
    KVPAGE_SHARED(std::int32_t, next);
    __syncthreads();
    if (threadIdx.x == 0) {
      next = atomicAdd(p.state.next_item, 1);
      if (next < count) {
        *work = At(p, next);
      } else {
        CountBlockOut(p.checked, p.last);
      }
    }
    __syncthreads();
    return next < count;
  }

  __device__ inline PrefillItem At(const AttentionParams& p, std::int32_t item) const {
    const Plan& plan = p.plan;
    const bool split = counts->split != 0;
    const std::int32_t* before = split ? plan.state_prefix : plan.unit_prefix;
    std::int32_t low = 0, high = counts->prefill;
    while (high - low > 1) {
      const std::int32_t middle = (low + high) / 2;
      (before[middle] <= item ? low : high) = middle;
    }
    PrefillItem work;
    work.sequence = plan.prefill_sequences[low];
    const std::int32_t window = p.checked->sliding_window;
    const Extent e = PrefillExtent(work.sequence, window, p);
    const std::int32_t spans = NumSpans(e), origin = e.begin >> e.shift;
    // The last rows first, because they have the longest context. Heads vary fastest, so that concurrent blocks share
    // a context.
    const std::int32_t local = item - before[low], rest = local / p.num_kv_heads;
    work.head = local % p.num_kv_heads;
    const std::int32_t index = split ? rest / spans : rest;
    work.first_row = (e.tiles - 1 - index) * p.prefill_rows;
    work.rows = static_cast<std::int32_t>(
        min(std::int64_t{p.prefill_rows}, std::int64_t{work.sequence.query_length} * p.group - work.first_row));
    work.from = FirstVisible(work.sequence.position + work.first_row / p.group, window);
    work.to = work.sequence.position + (work.first_row + work.rows - 1) / p.group + 1;
    work.shift = e.shift;
    work.first_span = (work.from >> e.shift) - origin;
    work.last_span = ((work.to - 1) >> e.shift) - origin;
    work.split = split && spans > 1;
    if (work.split) {
      const std::int32_t unit = index * p.num_kv_heads + work.head, span = rest % spans;
      work.unit = plan.unit_prefix[low] + unit;
      work.items = spans;
      work.first_state = plan.state_prefix[low] + unit * spans;
      work.state = work.first_state + span;
      work.from = max(work.from, (origin + span) << e.shift);
      work.to = static_cast<std::int32_t>(min(std::int64_t{work.to}, std::int64_t{origin + span + 1} << e.shift));
    }
    return work;
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_QUEUE_CUH_
