// The part of Attention that runs several units over the spans of a shared prefix together. Each part of a span is
// processed for all of the units before the next part: the first unit reads it from memory, the others from the L2
// cache.
//
// The shared data is read through the mapping of the first member. Each member's own mapping leads to the same memory
// but uses other TLB entries, which costs 6% more time in the fused layout and a third more in the per-layer one.
#include <algorithm>

#include "base/dtype.h"
#include "kernels/cpu/attention.h"

namespace kvpage::cpu {
namespace {

// Share of the L2 cache used for the keys and values of a part.
constexpr std::int64_t kPartBytes = 512 * 1024;

}  // namespace

// Tokens per part: whole tiles that divide a span. A quantized span is not divided: it is small, and its queries are
// prepared again for every part.
std::int64_t Attention::GroupPartTokens(const WorkUnit& unit) const {
  const auto token_bytes = static_cast<std::int64_t>(2 * unit.heads * head_dim_ * ItemSize(args_.kv.dtype));
  std::int64_t tokens = kSpanTokens;
  if (IsQuantized(args_.kv.dtype)) return tokens;
  while (tokens > kTileTokens && tokens * token_bytes > kPartBytes) tokens /= 2;
  return tokens;
}

LoadedRows Attention::Member(const WorkItem& item, int i, float* scratchpad) const {
  float* memory = scratchpad + layout_.members + i * layout_.member_size;
  const WorkUnit* unit = &plan_.units[plan_.members[item.first_member + i]];
  return {unit, &plan_.units[item.unit], memory + layout_.member_queries,
          reinterpret_cast<std::int32_t*>(memory + layout_.member_positions)};
}

void Attention::RunGroup(const WorkItem& item, const WorkItem* next, float* scratchpad) const {
  for (int i = 0; i < item.num_members; ++i) LoadQueries(Member(item, i, scratchpad));
  for (int span = item.span_begin; span < item.span_end; ++span) {
    RunGroupSpan(item, span, span + 1 == item.span_end ? next : nullptr, scratchpad);
  }
  for (int i = 0; i < item.num_members; ++i) {
    WorkUnit& unit = plan_.units[plan_.members[item.first_member + i]];
    if (std::max(item.span_begin, FirstSpan(unit)) < std::min(item.span_end, LastSpan(unit))) EndItem(&unit);
  }
}

void Attention::RunGroupSpan(const WorkItem& item, std::int64_t span, const WorkItem* next, float* scratchpad) const {
  const std::int64_t span_begin = span * kSpanTokens, span_end = span_begin + kSpanTokens;
  const std::int64_t tokens = GroupPartTokens(plan_.units[item.unit]);
  for (std::int64_t part = span_begin; part < span_end; part += tokens) {
    for (int i = 0; i < item.num_members; ++i) {
      const LoadedRows rows = Member(item, i, scratchpad);
      const WorkUnit& unit = *rows.unit;
      const std::int64_t first = std::max(unit.begin, span_begin), last = std::min(unit.end, span_end);
      const std::int64_t begin = std::max(first, part), end = std::min(last, part + tokens);
      if (begin >= end) continue;
      // After the last member the next part is read; after the others this part is read again and needs no prefetch.
      const bool leaves = i + 1 == item.num_members;
      const Lookahead ahead = leaves && end == last && next != nullptr
                                  ? StartOf(*next)
                                  : Lookahead{ContextOf(*rows.source), end, leaves ? rows.source->end : end};
      bool folds = false;
      float* state = PartialState(unit, span, &folds);
      if (folds) state = SpanStateOf(i, scratchpad);
      RunPart(rows, {begin, end, begin > first, end < last}, ahead, scratchpad, state);
    }
  }
  for (int i = 0; i < item.num_members; ++i) {
    const WorkUnit& unit = plan_.units[plan_.members[item.first_member + i]];
    if (span < FirstSpan(unit) || span >= LastSpan(unit)) continue;
    bool folds = false;
    float* state = PartialState(unit, span, &folds);
    if (folds) Merge(unit, state, SpanStateOf(i, scratchpad));
  }
}

}  // namespace kvpage::cpu
