// Plans one Attend call: cuts a ragged batch into work units, and these into items that workers take one at a time.
//
// A unit is a tile of query rows of one sequence with one KV head, or with several that are processed together. Its
// context is cut at multiples of SpanTokens(), and every span has its own softmax state. If the spans of a unit are
// split among several items, their states stay in the workspace until they are reduced. The spans of a shared prefix
// can be run by items that process several units together (prefix_groups.h).
#ifndef KVPAGE_KERNELS_CPU_PLAN_H_
#define KVPAGE_KERNELS_CPU_PLAN_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/prefix_groups.h"

namespace kvpage::cpu {

// Less work than this (in units of Plan::cost; about 10 microseconds) is not worth waking another thread.
constexpr double kInlineCost = 1 << 18;

struct WorkUnit {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t heads = 1;
  std::int32_t rows = 0;
  std::int64_t first_row = 0;
  std::int64_t begin = 0;  // positions [begin, end) that any of the rows sees
  std::int64_t end = 0;
  std::int64_t partials = -1;               // offset among the partial states; -1 if one item runs the whole unit
  std::int32_t folded = 1;                  // number of spans whose states the first item merges into one
  std::int32_t grouped_end = 0;             // spans before this one are run by items that cover several units
  std::atomic<std::int32_t> unfinished{0};  // remaining items of a unit with partial states

  WorkUnit() = default;
  WorkUnit(const WorkUnit& o)
      : sequence(o.sequence),
        kv_head(o.kv_head),
        heads(o.heads),
        rows(o.rows),
        first_row(o.first_row),
        begin(o.begin),
        end(o.end),
        partials(o.partials),
        folded(o.folded),
        grouped_end(o.grouped_end),
        unfinished(o.unfinished.load(std::memory_order_relaxed)) {}
};

// Spans [span_begin, span_end) of a unit or, if there are members, of several units that share the memory of these
// spans.
struct WorkItem {
  std::int32_t unit = 0;
  std::int32_t span_begin = 0;
  std::int32_t span_end = 0;
  std::int32_t first_member = 0;  // index into Plan::members
  std::int32_t num_members = 0;   // 0 if the item is not a group's
};

// The most units that an item processes together, for one KV head or for several: their queries and states share the L2
// cache with part of a span.
constexpr int kMaxMembers = 32;
constexpr int kMaxMembersOfHeads = 16;

struct Plan {
  std::vector<WorkUnit> units;
  std::vector<WorkItem> items;  // in the order in which workers should take them
  std::vector<std::int32_t> order;
  PrefixGroups prefix_groups;
  std::vector<std::int32_t> members;     // indices of units
  std::vector<std::int32_t> first_unit;  // for each sequence
  double cost = 0;
  // Size per item in floats: the largest over all units.
  std::int64_t query_floats = 0;
  std::int64_t state_floats = 0;
  std::int64_t scratch_floats = 0;
  std::int64_t scale_floats = 0;
  // Size per member of a group's item.
  std::int32_t most_members = 0;
  std::int64_t member_query_floats = 0;
  std::int64_t member_state_floats = 0;
  // Size of the partial states of all units.
  std::int64_t partial_floats = 0;
};

// Tokens that one softmax state covers.
std::int64_t SpanTokens(const WorkUnit& unit);

// Size in floats of a unit's state, for all of its heads.
std::int64_t UnitStateFloats(const WorkUnit& unit, int head_dim);

// The spans of a unit are [FirstSpan, LastSpan).
std::int32_t FirstSpan(const WorkUnit& unit);
std::int32_t LastSpan(const WorkUnit& unit);

// The first position of a unit that an item reads.
std::int64_t FirstPosition(const WorkUnit& unit, const WorkItem& item);

// The last position that new token i of a sequence sees.
std::int32_t LastVisible(const AttentionArgs& args, const Sequence& sequence, std::int64_t i);

// The call's sliding window; 0 if there is none.
std::int32_t SlidingWindow(const AttentionArgs& args);

// Overwrites *plan, reusing its memory. The units do not depend on num_workers, except for how many heads are processed
// together, which never changes a result.
void MakePlan(const AttentionArgs& args, int num_workers, Plan* plan);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_PLAN_H_
