// The part of the planner (plan.cuh) that finds decode sequences with a common prefix, and the spans that are computed
// once for all of them.
//
// Sequences are compared by the physical blocks that hold their tokens. Only full spans are shared, and only between
// sequences whose spans begin at the same positions and that have the same number of query tokens. A group has a
// leader, its first sequence, and every member shares some spans with it. If members are sorted by the number of these
// spans, the members that share any given span are a prefix of the list. Members that leave a group at the same span
// may share more without it: this is the next level.
//
// Cost: with a group, a span's keys and values are read once per GroupRows rows, while without it each member would
// read them itself, from memory or from the L2 cache. In exchange, there is another launch with work in it, and states
// pass through memory (a member's rows times 8 bytes per column, for each span of 1024 bytes or more per column). So
// groups are formed only if they save kLeastSavedBytes of reads in total, which take the L2 cache longer than that
// launch takes.
#ifndef KVPAGE_KERNELS_CUDA_PREFIX_GROUPS_CUH_
#define KVPAGE_KERNELS_CUDA_PREFIX_GROUPS_CUH_

#include <cstdint>

#include "kernels/cuda/check.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

inline constexpr int kPlanThreads = kCheckThreads;  // the check's block continues as the planner

// Sum of `value` over the threads before this one; *total is the sum over all threads. Every thread must call it.
__device__ __forceinline__ std::int64_t SumBefore(std::int64_t value, std::int64_t* total) {
  KVPAGE_SHARED(std::int64_t[kPlanThreads / kWarpSize], warps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  std::int64_t sum = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const std::int64_t other = __shfl_up_sync(kFullMask, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) warps[warp] = sum;
  __syncthreads();
  std::int64_t before = 0, all = 0;
  for (int w = 0; w < kPlanThreads / kWarpSize; ++w) {
    if (w == warp) before = all;
    all += warps[w];
  }
  *total = all;
  return before + sum - value;
}

// The blocks that hold the first tokens of slots: from DeviceRuns or from a block table.
struct PrefixRuns {
  const std::int32_t* blocks;  // [slots, width]; null if nothing is known
  const std::int32_t* counts;  // [slots]; null if a row has all blocks of its sequence
  std::int64_t width;
  std::int32_t block_tokens;
  // For DeviceRuns: the pool they belong to, and DevicePool::run_cuts when they were read.
  std::int32_t pool;
  std::uint32_t run_cuts;
};

// Must be called by all threads of the planner's block.
class PrefixFinder {
 public:
  __device__ PrefixFinder(const AttentionParams& p, std::int32_t window, const PrefixRuns& runs)
      : p_(p), plan_(p.plan), window_(window), runs_(runs), count_(p.plan.counts->decode) {}

  // Sets the groups, Plan::prefix_spans and Plan::prefix_rows; returns false if there are none.
  __device__ bool Run() {
    if (Prepare() < 2) return false;
    for (std::int32_t level = 0; level < kGroupLevels; ++level) {
      const std::int32_t before = groups_;
      FindLeaders();
      __syncthreads();
      CompareWithLeaders();
      __syncthreads();
      FormGroups(level);
      __syncthreads();
      for (std::int32_t i = threadIdx.x; i < count_; i += kPlanThreads) {
        PrefixState& state = plan_.prefix_states[i];
        state.leader = state.next_leader;
        // There is nobody left to share with.
        if (state.next_spans == state.spans) state.most = state.spans;
        state.spans = state.next_spans;
      }
      __syncthreads();
      if (groups_ == before) break;
    }
    if (groups_ == 0 || saved_ < p_.least_saved) return false;
    for (std::int32_t i = threadIdx.x; i < count_; i += kPlanThreads) {
      plan_.prefix_spans[i] = plan_.prefix_states[i].spans;
    }
    if (threadIdx.x == 0) {
      plan_.counts->groups = groups_;
      plan_.counts->group_items = items_;
      plan_.counts->pool = runs_.pool;
      plan_.counts->run_cuts = runs_.run_cuts;
    }
    return true;
  }

 private:
  __device__ const std::int32_t* Blocks(std::int32_t i) const {
    return runs_.blocks + plan_.decode_sequences[i].slot * runs_.width;
  }
  // The block that holds a span's first token.
  __device__ std::int32_t FirstBlock(const PrefixState& state, std::int32_t span) const {
    return (span << (state.kind & 31)) / runs_.block_tokens;
  }
  // Bypasses the L1 cache: the host may extend a run meanwhile, writing blocks first and then their count.
  __device__ std::int32_t Block(std::int32_t i, std::int32_t block) const { return __ldcg(Blocks(i) + block); }
  __device__ std::int32_t Rows(std::int32_t i) const { return plan_.decode_sequences[i].query_length * p_.group; }

  // Finds which spans may be shared, and where their states are stored. Returns the number of sequences that have any.
  __device__ std::int64_t Prepare() {
    std::int64_t rows_before = 0, eligible = 0;
    for (std::int32_t base = 0; base < count_; base += kPlanThreads) {
      const std::int32_t i = base + static_cast<std::int32_t>(threadIdx.x);
      std::int32_t most = 0, shift = 0, queries = 0;
      if (i < count_) {
        const Sequence s = plan_.decode_sequences[i];
        std::int64_t tokens = s.position;  // visible to all rows
        if (runs_.counts != nullptr)
          tokens = min(tokens, std::int64_t{__ldcg(runs_.counts + s.slot)} * runs_.block_tokens);
        tokens = min(tokens, runs_.width * runs_.block_tokens);
        if (FirstVisible(s.position + s.query_length - 1, window_) > 0) tokens = 0;
        shift = DecodeExtent(s, window_, p_.group).shift;
        most = static_cast<std::int32_t>(tokens >> shift);
        queries = s.query_length;
      }
      std::int64_t all_rows, all_eligible;
      const std::int64_t rows = most > 0 ? std::int64_t{Rows(i)} * p_.num_kv_heads : 0;
      const std::int64_t at = rows_before + SumBefore(rows, &all_rows);
      if (at + rows > p_.max_prefix_rows) most = 0;
      SumBefore(most > 0 ? 1 : 0, &all_eligible);
      if (i < count_) {
        plan_.prefix_rows[i] = static_cast<std::int32_t>(min(at, std::int64_t{p_.max_prefix_rows}));
        plan_.prefix_states[i] = {-1, 0, most, queries << 5 | shift, -1, 0, 0};
      }
      rows_before += all_rows;
      eligible += all_eligible;
    }
    __threadfence();  // between the counts and the blocks
    __syncthreads();
    return eligible;
  }

  // Finds for each sequence the first one with the same prefix up to here and the same next block.
  __device__ void FindLeaders() {
    for (std::int32_t i = threadIdx.x; i < count_; i += kPlanThreads) {
      PrefixState& mine = plan_.prefix_states[i];
      mine.next_leader = -1;
      mine.next_spans = mine.spans;
      if (mine.spans >= mine.most) continue;
      const std::int32_t at = FirstBlock(mine, mine.spans);
      const std::int32_t block = Block(i, at);
      std::int32_t j = 0;
      for (; j < i; ++j) {
        const PrefixState& other = plan_.prefix_states[j];
        if (other.leader == mine.leader && other.spans == mine.spans && other.kind == mine.kind &&
            other.spans < other.most && Block(j, at) == block) {
          break;
        }
      }
      mine.next_leader = j;
    }
  }

  // Finds where the spans end that a sequence shares with its leader; one warp per sequence.
  __device__ void CompareWithLeaders() {
    const int lane = threadIdx.x % kWarpSize;
    for (std::int32_t i = threadIdx.x / kWarpSize; i < count_; i += kPlanThreads / kWarpSize) {
      PrefixState& mine = plan_.prefix_states[i];
      const std::int32_t leader = mine.next_leader, shift = mine.kind & 31;
      if (leader < 0) continue;
      const std::int32_t most = min(mine.most, plan_.prefix_states[leader].most);
      const std::int32_t end = ((most << shift) - 1) / runs_.block_tokens + 1;
      std::int32_t equal = FirstBlock(mine, mine.spans);
      while (equal < end && leader != i) {
        const std::int32_t at = equal + lane;
        const bool differs = at >= end || Block(i, at) != Block(leader, at);
        const unsigned where = __ballot_sync(kFullMask, differs);
        equal += where == 0 ? kWarpSize : __ffs(static_cast<int>(where)) - 1;
        if (where != 0) break;
      }
      const std::int64_t spans = leader == i || equal >= end ? most : std::int64_t{equal} * runs_.block_tokens >> shift;
      __syncwarp(kFullMask);
      if (lane == 0) mine.end = max(mine.spans, static_cast<std::int32_t>(spans));
    }
  }

  __device__ static bool Joins(const PrefixState& state) { return state.next_leader >= 0 && state.end > state.spans; }

  // Sorts the members of each leader, longest shared prefix first, and forms a group for each run of spans with the
  // same members.
  __device__ void FormGroups(std::int32_t level) {
    std::int32_t* const members = plan_.members + level * p_.num_sequences;
    for (std::int32_t base = 0; base < count_; base += kPlanThreads) {
      const std::int32_t i = base + static_cast<std::int32_t>(threadIdx.x);
      PrefixGroup group = {};
      std::int32_t blocks = 0;
      if (i < count_ && Joins(plan_.prefix_states[i])) {
        PrefixState& mine = plan_.prefix_states[i];
        std::int32_t first = 0, rank = 0, size = 0, second = -1, next = mine.spans;
        for (std::int32_t j = 0; j < count_; ++j) {
          const PrefixState& other = plan_.prefix_states[j];
          if (!Joins(other)) continue;
          if (other.next_leader != mine.next_leader) {
            first += other.next_leader < mine.next_leader;
            continue;
          }
          ++size;
          if (j != mine.next_leader) second = max(second, other.end);
          if (other.end > mine.end || (other.end == mine.end && j < i)) {
            ++rank;
          } else if (j != i) {
            next = max(next, other.end);
          }
        }
        members[first + rank] = i;
        if (size > 1) mine.next_spans = rank == 0 ? second : mine.end;
        // If the next member has the same end, the group is formed by that member instead.
        if (rank > 0 && next < mine.end) {
          group = {level * p_.num_sequences + first, rank + 1, next, mine.end, 0};
          blocks = (group.count - 1) / max(p_.group_rows / Rows(i), 1) + 1;
          const std::int64_t bytes = 4ll * p_.head_dim * p_.num_kv_heads << (mine.kind & 31);
          group.items = blocks * (group.span_end - group.span_begin);
          saved_part_ = bytes * (group.count - blocks) * (group.span_end - group.span_begin);
        }
      }
      std::int64_t all_groups, all_items, all_saved;
      const std::int64_t at = groups_ + SumBefore(group.count > 0 ? 1 : 0, &all_groups);
      const std::int64_t items = items_ + SumBefore(group.items, &all_items);
      SumBefore(group.count > 0 ? saved_part_ : 0, &all_saved);
      if (group.count > 0) {
        group.items = static_cast<std::int32_t>(items);
        plan_.groups[at] = group;
      }
      groups_ += static_cast<std::int32_t>(all_groups);
      items_ += static_cast<std::int32_t>(all_items);
      saved_ += all_saved;
    }
  }

  const AttentionParams& p_;
  const Plan& plan_;
  const std::int32_t window_;
  const PrefixRuns& runs_;
  const std::int32_t count_;
  std::int32_t groups_ = 0, items_ = 0;
  std::int64_t saved_ = 0, saved_part_ = 0;
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFIX_GROUPS_CUH_
