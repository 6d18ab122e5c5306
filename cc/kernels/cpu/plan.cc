#include "kernels/cpu/plan.h"

#include <algorithm>

#include "base/dtype.h"

namespace kvpage::cpu {
namespace {

// Target number of items per worker, so that short contexts can even out the load of long ones.
constexpr int kItemsPerWorker = 4;
// The same for heads that could be processed together. Lower, because splitting a token's row costs speed.
constexpr int kHeadItemsPerWorker = 2;

// Rows per unit of a prefill. Units are large because each packs the keys and values that it sees, but there must be
// enough of them to keep all threads busy. Independent of the number of threads, which must not affect the result.
std::int64_t UnitRows(std::int64_t rows) {
  constexpr std::int64_t kUnits = 8, kLeastRows = 16 * kRowBlock;
  const std::int64_t wanted = (rows + kUnits - 1) / kUnits;
  return std::clamp<std::int64_t>((wanted + kRowBlock - 1) / kRowBlock * kRowBlock, kLeastRows, kMaxRows);
}

class Planner {
 public:
  Planner(const AttentionArgs& args, int num_workers, Plan* plan)
      : args_(args),
        num_workers_(num_workers),
        plan_(*plan),
        group_(args.num_q_heads / args.kv.num_kv_heads),
        head_dim_(args.kv.head_dim),
        window_(SlidingWindow(args)) {}

  void ListUnits();
  void ListItems();

 private:
  int HeadsTogether() const;
  void AddUnits(std::int32_t index, int heads_together);
  void AddGroup(const PrefixGroup& group, double wanted);
  void AddGroupItems(std::int32_t first_member, std::int32_t num_members, const PrefixGroup& group, int pieces);
  void AddItems(std::size_t index, double wanted);
  void NoteItem(WorkUnit* unit, const WorkItem& item);
  void AddPartials(WorkUnit* unit);
  double Cost(std::int64_t tokens, int heads, std::int64_t rows) const;
  double OwnCost(const WorkUnit& unit) const;
  double GroupCost(const PrefixGroup& group) const;

  const AttentionArgs& args_;
  const int num_workers_;
  Plan& plan_;
  const int group_;
  const int head_dim_;
  const std::int32_t window_;
};

// Cost of reading the context, plus the arithmetic of every row on it.
double Planner::Cost(std::int64_t tokens, int heads, std::int64_t rows) const {
  return static_cast<double>(tokens) * heads * head_dim_ * (2.0 * ItemSize(args_.kv.dtype) + static_cast<double>(rows));
}

// The cost of the unit's own items, without those of groups.
double Planner::OwnCost(const WorkUnit& unit) const {
  const std::int64_t begin = std::max(unit.begin, unit.grouped_end * SpanTokens(unit));
  return begin < unit.end ? Cost(unit.end - begin, unit.heads, unit.rows) : 0.0;
}

// The cost of a group, over all heads.
double Planner::GroupCost(const PrefixGroup& group) const {
  std::int64_t rows = 0;
  for (std::int32_t i = 0; i < group.count; ++i) {
    rows += (*args_.sequences)[plan_.prefix_groups.order[group.first + i]].query_length * std::int64_t{group_};
  }
  return Cost(std::int64_t{group.span_end - group.span_begin} * kSpanTokens, args_.kv.num_kv_heads, rows);
}

// Decode is bound by memory: adjacent heads of a token are read together, unless the contexts are so short that some
// workers would get no work.
int Planner::HeadsTogether() const {
  const KVView& kv = args_.kv;
  if (kv.num_kv_heads == 1 || kv.head_stride >= kv.token_stride) return 1;
  std::int64_t spans = 0;
  for (const Sequence& s : *args_.sequences) spans += (s.end() + kSpanTokens - 1) / kSpanTokens;
  int heads = std::min(kv.num_kv_heads, kMaxHeads);
  const std::int64_t wanted = num_workers_ == 1 ? 1 : kHeadItemsPerWorker * std::int64_t{num_workers_};
  while (heads > 2 && (kv.num_kv_heads + heads - 1) / heads * spans < wanted) heads = (heads + 1) / 2;
  return heads;
}

void Planner::AddUnits(std::int32_t index, int heads_together) {
  const Sequence& sequence = (*args_.sequences)[index];
  const KVView& kv = args_.kv;
  const std::int64_t rows = std::int64_t{sequence.query_length} * group_;
  const int heads = rows <= kDecodeRows ? heads_together : 1;
  const std::int64_t unit_rows = UnitRows(rows);
  const std::int64_t tiles = (rows + unit_rows - 1) / unit_rows;
  // Later rows see more context. The long units come first, and the short ones fill the gaps.
  for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
    for (int head = 0; head < kv.num_kv_heads; head += heads) {
      WorkUnit unit;
      unit.sequence = index;
      unit.kv_head = head;
      unit.heads = std::min(heads, kv.num_kv_heads - head);
      unit.first_row = tile * unit_rows;
      unit.rows = static_cast<std::int32_t>(std::min(unit_rows, rows - unit.first_row));
      unit.end = std::int64_t{LastVisible(args_, sequence, (unit.first_row + unit.rows - 1) / group_)} + 1;
      if (window_ > 0) {
        unit.begin = std::max<std::int64_t>(0, sequence.position + unit.first_row / group_ - std::int64_t{window_} + 1);
      }
      plan_.units.push_back(unit);
    }
  }
}

// Longest contexts first.
void Planner::ListUnits() {
  const std::vector<Sequence>& sequences = *args_.sequences;
  std::vector<std::int32_t>& order = plan_.order;
  for (std::size_t i = 0; i < sequences.size(); ++i) order.push_back(static_cast<std::int32_t>(i));
  const auto end_of = [&](std::int32_t i) { return sequences[i].end(); };
  std::sort(order.begin(), order.end(),
            [&](std::int32_t a, std::int32_t b) { return end_of(a) != end_of(b) ? end_of(a) > end_of(b) : a < b; });
  const int heads_together = HeadsTogether();
  plan_.first_unit.resize(sequences.size());
  for (const std::int32_t index : order) {
    plan_.first_unit[index] = static_cast<std::int32_t>(plan_.units.size());
    AddUnits(index, heads_together);
  }
}

// Accounts for an item in a unit if it runs any of the unit's spans.
void Planner::NoteItem(WorkUnit* unit, const WorkItem& item) {
  const std::int32_t first = FirstSpan(*unit), last = LastSpan(*unit);
  const std::int32_t begin = std::max(item.span_begin, first), end = std::min(item.span_end, last);
  if (begin >= end) return;
  if (begin == first) unit->folded = end - first;
  unit->unfinished.fetch_add(1, std::memory_order_relaxed);
}

void Planner::AddPartials(WorkUnit* unit) {
  unit->partials = plan_.partial_floats;
  plan_.partial_floats += (LastSpan(*unit) - FirstSpan(*unit) - unit->folded + 1) * UnitStateFloats(*unit, head_dim_);
}

// Cuts the remaining spans of a unit into items of about `wanted` cost each, or into one item if `wanted` is 0.
void Planner::AddItems(std::size_t index, double wanted) {
  WorkUnit& unit = plan_.units[index];
  const std::int32_t first = std::max(FirstSpan(unit), unit.grouped_end), last = LastSpan(unit);
  const double pieces = wanted > 0 ? OwnCost(unit) / wanted : 1.0;
  const int spans = last - first;
  const int spans_per_item = pieces <= 1.0 ? spans : std::max(1, static_cast<int>(spans / pieces));
  for (int span = first; span < last; span += spans_per_item) {
    plan_.items.push_back({static_cast<std::int32_t>(index), span, std::min(span + spans_per_item, last)});
    NoteItem(&unit, plan_.items.back());
  }
  if (unit.grouped_end > 0 || unit.unfinished.load(std::memory_order_relaxed) > 1) AddPartials(&unit);
}

// Cuts the spans of a group into `pieces` items that cover num_members of its members.
void Planner::AddGroupItems(std::int32_t first_member, std::int32_t num_members, const PrefixGroup& group, int pieces) {
  const int spans = group.span_end - group.span_begin;
  const int spans_per_item = (spans + pieces - 1) / pieces;
  for (int span = group.span_begin; span < group.span_end; span += spans_per_item) {
    const std::int32_t end = std::min(span + spans_per_item, group.span_end);
    plan_.items.push_back({plan_.members[first_member], span, end, first_member, num_members});
    for (std::int32_t i = 0; i < num_members; ++i) {
      NoteItem(&plan_.units[plan_.members[first_member + i]], plan_.items.back());
    }
  }
  plan_.most_members = std::max(plan_.most_members, num_members);
  for (std::int32_t i = 0; i < num_members; ++i) {
    const WorkUnit& unit = plan_.units[plan_.members[first_member + i]];
    plan_.member_query_floats = std::max(plan_.member_query_floats, unit.heads * QueryFloats(unit.rows, head_dim_));
    plan_.member_state_floats = std::max(plan_.member_state_floats, UnitStateFloats(unit, head_dim_));
  }
}

// Cuts a group by heads (in the same way as its units), then by spans, then by members.
void Planner::AddGroup(const PrefixGroup& group, double wanted) {
  const std::vector<std::int32_t>& order = plan_.prefix_groups.order;
  const int spans = group.span_end - group.span_begin;
  const std::int32_t first_unit = plan_.first_unit[order[group.first]];
  const int heads = plan_.units[first_unit].heads, blocks = (args_.kv.num_kv_heads + heads - 1) / heads;
  const int pieces = wanted > 0 ? std::max(1, static_cast<int>(GroupCost(group) / blocks / wanted)) : 1;
  const int span_pieces = std::min(pieces, spans);
  const int most_members = heads > 1 ? kMaxMembersOfHeads : kMaxMembers;
  int chunks = (pieces + span_pieces - 1) / span_pieces;
  chunks = std::max(std::min(chunks, group.count / 2), (group.count + most_members - 1) / most_members);
  const int size = (group.count + chunks - 1) / chunks;
  for (int block = 0; block < blocks; ++block) {
    for (int at = 0; at < group.count; at += size) {
      const auto first_member = static_cast<std::int32_t>(plan_.members.size());
      const int count = std::min(size, group.count - at);
      for (int i = 0; i < count; ++i) plan_.members.push_back(plan_.first_unit[order[group.first + at + i]] + block);
      AddGroupItems(first_member, count, group, span_pieces);
    }
  }
}

void Planner::ListItems() {
  const std::vector<PrefixGroup>& groups = plan_.prefix_groups.groups;
  for (const PrefixGroup& group : groups) {
    plan_.cost += GroupCost(group);
    for (std::int32_t i = 0; i < group.count; ++i) {
      const std::int32_t sequence = plan_.prefix_groups.order[group.first + i];
      for (std::int32_t u = plan_.first_unit[sequence], head = 0; head < args_.kv.num_kv_heads; ++u) {
        plan_.units[u].grouped_end = std::min(group.span_end, LastSpan(plan_.units[u]));
        head += plan_.units[u].heads;
      }
    }
  }
  for (const WorkUnit& unit : plan_.units) plan_.cost += OwnCost(unit);
  const bool share = num_workers_ > 1 && plan_.cost >= kInlineCost;
  const double wanted = share ? plan_.cost / (double{kItemsPerWorker} * num_workers_) : 0.0;
  for (const PrefixGroup& group : groups) AddGroup(group, wanted);
  for (std::size_t i = 0; i < plan_.units.size(); ++i) {
    const WorkUnit& unit = plan_.units[i];
    AddItems(i, wanted);
    plan_.query_floats = std::max(plan_.query_floats, unit.heads * QueryFloats(unit.rows, head_dim_));
    plan_.state_floats = std::max(plan_.state_floats, UnitStateFloats(unit, head_dim_));
    plan_.scratch_floats = std::max(plan_.scratch_floats, ScratchFloats(unit.rows, head_dim_, unit.heads));
    if (IsQuantized(args_.kv.dtype)) {
      plan_.scale_floats = std::max<std::int64_t>(plan_.scale_floats, std::int64_t{unit.heads} * 2 * kSpanScales);
    }
  }
}

}  // namespace

// Merging is more expensive with the rows of prefill, and splitting is less necessary: a unit with many rows has a lot
// of work per token, and there are other units. The kernels process longer spans in steps of kSpanTokens.
std::int64_t SpanTokens(const WorkUnit& unit) { return unit.rows <= kDecodeRows ? kSpanTokens : 4 * kSpanTokens; }

std::int64_t UnitStateFloats(const WorkUnit& unit, int head_dim) {
  return unit.heads * StateFloats(unit.rows, head_dim);
}

std::int32_t FirstSpan(const WorkUnit& unit) { return static_cast<std::int32_t>(unit.begin / SpanTokens(unit)); }

std::int32_t LastSpan(const WorkUnit& unit) { return static_cast<std::int32_t>((unit.end - 1) / SpanTokens(unit) + 1); }

std::int64_t FirstPosition(const WorkUnit& unit, const WorkItem& item) {
  return std::max<std::int64_t>(unit.begin, item.span_begin * SpanTokens(unit));
}

std::int32_t LastVisible(const AttentionArgs& args, const Sequence& sequence, std::int64_t i) {
  return args.limits != nullptr ? args.limits[sequence.query_begin + i]
                                : sequence.position + static_cast<std::int32_t>(i);
}

std::int32_t SlidingWindow(const AttentionArgs& args) {
  return args.options.sliding_window != nullptr ? *args.options.sliding_window : 0;
}

void MakePlan(const AttentionArgs& args, int num_workers, Plan* plan) {
  plan->units.clear();
  plan->items.clear();
  plan->order.clear();
  plan->members.clear();
  plan->most_members = 0;
  plan->member_query_floats = plan->member_state_floats = 0;
  plan->cost = 0;
  plan->query_floats = plan->state_floats = plan->scratch_floats = plan->scale_floats = plan->partial_floats = 0;
  FindPrefixGroups(args, &plan->prefix_groups);
  Planner planner(args, num_workers, plan);
  planner.ListUnits();
  planner.ListItems();
}

}  // namespace kvpage::cpu
