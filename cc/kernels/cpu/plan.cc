#include "kernels/cpu/plan.h"

#include <algorithm>

#include "base/dtype.h"

namespace kvpage::cpu {
namespace {

// Items that a worker should get, so that those with short contexts can even out those with long ones.
constexpr int kItemsPerWorker = 4;
// The same for heads that could be walked together: fewer, because every split of a token's row costs speed.
constexpr int kHeadItemsPerWorker = 2;

// Rows of the units that a prefill becomes. Large ones, because each packs the keys and values that it sees; but enough
// of them to keep all threads busy. Independent of the number of threads, which must not show in the result.
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
  void AddItems(std::size_t index, double pieces);
  double Cost(const WorkUnit& unit) const;

  const AttentionArgs& args_;
  const int num_workers_;
  Plan& plan_;
  const int group_;
  const int head_dim_;
  const std::int32_t window_;
};

double Planner::Cost(const WorkUnit& unit) const {
  // Reading the context, and the arithmetic of every row on it.
  const double tokens = static_cast<double>(unit.end - unit.begin);
  return tokens * unit.heads * head_dim_ * (2.0 * ItemSize(args_.kv.dtype) + unit.rows);
}

// Decode is bound by memory: where the heads of a token are neighbours they are read together, unless the contexts are
// so short that not every worker would get some.
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
  // Later rows see more: the long units come first and the short ones fill the gaps.
  for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
    for (int head = 0; head < kv.num_kv_heads; head += heads) {
      WorkUnit unit;
      unit.sequence = index;
      unit.kv_head = head;
      unit.heads = std::min(heads, kv.num_kv_heads - head);
      unit.first_row = tile * unit_rows;
      unit.rows = static_cast<std::int32_t>(std::min(unit_rows, rows - unit.first_row));
      unit.end = sequence.position + (unit.first_row + unit.rows - 1) / group_ + 1;
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
  for (const std::int32_t index : order) AddUnits(index, heads_together);
}

// Cuts a unit into about `pieces` items of whole spans.
void Planner::AddItems(std::size_t index, double pieces) {
  WorkUnit& unit = plan_.units[index];
  const auto first = static_cast<std::int32_t>(unit.begin / SpanTokens(unit));
  const auto last = static_cast<std::int32_t>((unit.end - 1) / SpanTokens(unit) + 1);
  const int spans = last - first;
  const int spans_per_item = pieces <= 1.0 ? spans : std::max(1, static_cast<int>(spans / pieces));
  for (int span = first; span < last; span += spans_per_item) {
    plan_.items.push_back({static_cast<std::int32_t>(index), span, std::min(span + spans_per_item, last)});
  }
  const int items = (spans + spans_per_item - 1) / spans_per_item;
  if (items > 1) {
    unit.partials = plan_.partial_floats;
    plan_.partial_floats += spans * UnitStateFloats(unit, head_dim_);
    unit.unfinished.store(items, std::memory_order_relaxed);
  }
}

void Planner::ListItems() {
  for (const WorkUnit& unit : plan_.units) plan_.cost += Cost(unit);
  const double wanted = plan_.cost / (double{kItemsPerWorker} * num_workers_);
  const bool share = num_workers_ > 1 && plan_.cost >= kInlineCost;
  for (std::size_t i = 0; i < plan_.units.size(); ++i) {
    const WorkUnit& unit = plan_.units[i];
    AddItems(i, share ? Cost(unit) / wanted : 1.0);
    plan_.query_floats = std::max(plan_.query_floats, unit.heads * QueryFloats(unit.rows, head_dim_));
    plan_.state_floats = std::max(plan_.state_floats, UnitStateFloats(unit, head_dim_));
    plan_.scratch_floats = std::max(plan_.scratch_floats, ScratchFloats(unit.rows, head_dim_, unit.heads));
    if (IsQuantized(args_.kv.dtype)) {
      plan_.scale_floats = std::max<std::int64_t>(plan_.scale_floats, std::int64_t{unit.heads} * 2 * kSpanScales);
    }
  }
}

}  // namespace

// Merging costs more with the rows of prefill, and it has less need of being shared out: a unit with many rows has much
// work for every token, and there are other units. The kernels take longer spans in steps of kSpanTokens.
std::int64_t SpanTokens(const WorkUnit& unit) { return unit.rows <= kDecodeRows ? kSpanTokens : 4 * kSpanTokens; }

std::int64_t UnitStateFloats(const WorkUnit& unit, int head_dim) {
  return unit.heads * StateFloats(unit.rows, head_dim);
}

std::int64_t FirstPosition(const WorkUnit& unit, const WorkItem& item) {
  return std::max<std::int64_t>(unit.begin, item.span_begin * SpanTokens(unit));
}

std::int32_t SlidingWindow(const AttentionArgs& args) {
  return args.options.sliding_window != nullptr ? *args.options.sliding_window : 0;
}

void MakePlan(const AttentionArgs& args, int num_workers, Plan* plan) {
  plan->units.clear();
  plan->items.clear();
  plan->order.clear();
  plan->cost = 0;
  plan->query_floats = plan->state_floats = plan->scratch_floats = plan->scale_floats = plan->partial_floats = 0;
  Planner planner(args, num_workers, plan);
  planner.ListUnits();
  planner.ListItems();
}

}  // namespace kvpage::cpu
