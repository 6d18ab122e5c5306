// Plans one Attend call: cuts a ragged batch into work units, and these into items that workers take one at a time.
//
// A unit is a tile of query rows of a sequence with one KV head, or several that are walked together. Its context is
// cut at multiples of SpanTokens(); every span has its own softmax state. A unit whose spans are shared out over
// several items keeps these states in the workspace until they are reduced. The spans of a shared prefix may go to
// items that take several units through them together (prefix_groups.h).
#ifndef KVPAGE_KERNELS_CPU_PLAN_H_
#define KVPAGE_KERNELS_CPU_PLAN_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/prefix_groups.h"

namespace kvpage::cpu {

// Less work than this (in units of Plan::cost, some 10 microseconds) is not worth waking another thread.
constexpr double kInlineCost = 1 << 18;

struct WorkUnit {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t heads = 1;
  std::int32_t rows = 0;
  std::int64_t first_row = 0;
  std::int64_t begin = 0;  // positions that any of the rows sees
  std::int64_t end = 0;
  std::int64_t partials = -1;  // offset of its spans' states among the partial ones; -1: one item does all of the unit
  std::int32_t folded = 1;     // spans whose states its first item merges into one as it goes
  std::int32_t grouped_end = 0;             // spans before it are taken by items of several units
  std::atomic<std::int32_t> unfinished{0};  // items, of a unit with partial states

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

// Spans [span_begin, span_end) of a unit; or, with members, of several units, for which they lie in the same memory.
struct WorkItem {
  std::int32_t unit = 0;
  std::int32_t span_begin = 0;
  std::int32_t span_end = 0;
  std::int32_t first_member = 0;  // place among Plan::members
  std::int32_t num_members = 0;   // 0: not a group
};

// The most units that an item takes together, of one KV head or of several: their queries and states share the
// second-level cache with a part of a span.
constexpr int kMaxMembers = 32;
constexpr int kMaxMembersOfHeads = 16;

struct Plan {
  std::vector<WorkUnit> units;
  std::vector<WorkItem> items;  // in the order in which workers should take them
  std::vector<std::int32_t> order;
  PrefixGroups prefix_groups;
  std::vector<std::int32_t> members;     // units
  std::vector<std::int32_t> first_unit;  // of each sequence
  double cost = 0;
  // Room that one item needs, in floats: the largest of all units.
  std::int64_t query_floats = 0;
  std::int64_t state_floats = 0;
  std::int64_t scratch_floats = 0;
  std::int64_t scale_floats = 0;
  // Room for each member of a group's item.
  std::int32_t most_members = 0;
  std::int64_t member_query_floats = 0;
  std::int64_t member_state_floats = 0;
  // Room for the partial states of all units.
  std::int64_t partial_floats = 0;
};

// Tokens that one state covers.
std::int64_t SpanTokens(const WorkUnit& unit);

// Floats of the state of a unit, all heads.
std::int64_t UnitStateFloats(const WorkUnit& unit, int head_dim);

// The spans of a unit are [FirstSpan, LastSpan).
std::int32_t FirstSpan(const WorkUnit& unit);
std::int32_t LastSpan(const WorkUnit& unit);

// The first position that an item reads of a unit.
std::int64_t FirstPosition(const WorkUnit& unit, const WorkItem& item);

// The last position that new token i of a sequence sees.
std::int32_t LastVisible(const AttentionArgs& args, const Sequence& sequence, std::int64_t i);

// The window of the call; 0: none.
std::int32_t SlidingWindow(const AttentionArgs& args);

// Overwrites *plan, whose memory is reused. The units do not depend on num_workers, except for how many heads are
// walked together, which never changes a result.
void MakePlan(const AttentionArgs& args, int num_workers, Plan* plan);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_PLAN_H_
