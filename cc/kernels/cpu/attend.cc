// Attention: plans a ragged batch (plan.h), runs its work items, reduces the states of units that were shared out.
//
// Every span of a unit gives a softmax state, and states are merged in the order of the spans: by the item that ran
// them all, or, when a long context was shared out, by the item of the unit that ends last. Both do the same
// arithmetic, so the number of items never shows in the result.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/cpu/context.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/workspace.h"

namespace kvpage::cpu {
namespace {

// Bytes of keys to prefetch before an item begins, at most. More would arrive no sooner.
constexpr int kStartBytes = 16384;

// Offsets in a worker's scratchpad, its part of the workspace, in floats.
struct ScratchpadLayout {
  std::int64_t queries = 0;
  std::int64_t state = 0;
  std::int64_t span_state = 0;
  std::int64_t scratch = 0;
  std::int64_t positions = 0;
  std::int64_t keys = 0;
  std::int64_t values = 0;
  std::int64_t scales = 0;
  std::int64_t size = 0;
};

class Attention {
 public:
  Attention(const AttentionArgs& args, Workspace& workspace)
      : args_(args),
        workspace_(workspace),
        plan_(workspace.plan),
        kernels_(ActiveKernels()),
        group_(args.num_q_heads / args.kv.num_kv_heads),
        head_dim_(args.kv.head_dim),
        window_(SlidingWindow(args)),
        state_scale_(StateScale(args.options.scale, args.options.soft_cap, args.options.alibi_slopes != nullptr)) {}

  bool Allocate(int num_workers);
  void Run(std::int64_t index, int worker) const;
  std::int64_t num_items() const { return static_cast<std::int64_t>(plan_.items.size()); }

 private:
  QueryTile Tile(const WorkUnit& unit) const;
  Context ContextOf(const WorkUnit& unit) const {
    return Context(args_.kv, args_.layer, (*args_.sequences)[unit.sequence].slot, unit.kv_head, unit.heads);
  }
  char* QueryRow(const void* base, const WorkUnit& unit) const;
  void PrefetchStart(const WorkItem& item) const;
  void LoadQueries(const WorkUnit& unit, float* scratchpad) const;
  void RunSpan(const WorkUnit& unit, std::int64_t span, const WorkItem* next, float* scratchpad, float* state) const;
  void RunPart(const WorkUnit& unit, std::int64_t begin, std::int64_t end, bool resume, const WorkItem* next,
               float* scratchpad, float* state) const;
  void Merge(const WorkUnit& unit, float* into, const float* from) const;
  void Finish(const WorkUnit& unit, const float* state) const;

  const AttentionArgs& args_;
  Workspace& workspace_;
  Plan& plan_;
  const Kernels& kernels_;
  const int group_;
  const int head_dim_;
  const std::int32_t window_;
  const float state_scale_;
  int num_workers_ = 1;
  ScratchpadLayout layout_;
  float* scratchpads_ = nullptr;
  float* partials_ = nullptr;
};

QueryTile Attention::Tile(const WorkUnit& unit) const {
  QueryTile tile;
  tile.rows = unit.rows;
  tile.first_row = unit.first_row;
  tile.group = group_;
  tile.num_q_heads = args_.num_q_heads;
  tile.head_dim = head_dim_;
  return tile;
}

bool Attention::Allocate(int num_workers) {
  num_workers_ = num_workers;
  constexpr std::int64_t kLine = 16;  // floats of a cache line
  const auto place = [&](std::int64_t floats) {
    const std::int64_t here = layout_.size;
    layout_.size += (floats + kLine - 1) / kLine * kLine;
    return here;
  };
  layout_.queries = place(plan_.query_floats);
  layout_.state = place(plan_.state_floats);
  layout_.span_state = place(plan_.state_floats);
  layout_.scratch = place(plan_.scratch_floats);
  layout_.positions = place(kMaxRows);
  constexpr auto kListFloats = (kSpanTokens + kLookahead) * static_cast<std::int64_t>(sizeof(char*) / sizeof(float));
  layout_.keys = place(kListFloats);
  layout_.values = args_.kv.values_apart() ? place(kListFloats) : layout_.keys;
  layout_.scales = place(plan_.scale_floats);
  scratchpads_ = workspace_.Floats(layout_.size * num_workers + plan_.partial_floats);
  if (scratchpads_ == nullptr) return false;
  partials_ = scratchpads_ + layout_.size * num_workers;
  return true;
}

char* Attention::QueryRow(const void* base, const WorkUnit& unit) const {
  const std::int64_t token = (*args_.sequences)[unit.sequence].query_begin;
  const auto row_bytes = static_cast<std::int64_t>(head_dim_ * ItemSize(args_.q_dtype));
  return const_cast<char*>(static_cast<const char*>(base)) + token * args_.num_q_heads * row_bytes;
}

// Prefetches the first bytes that an item reads. The kernels prefetch as they go, but cannot before they have begun:
// meanwhile queries are converted and addresses listed.
void Attention::PrefetchStart(const WorkItem& item) const {
  const WorkUnit& unit = plan_.units[item.unit];
  const Context context = ContextOf(unit);
  const std::int64_t begin = FirstPosition(unit, item);
  if (IsQuantized(args_.kv.dtype)) context.PrefetchScales(begin, std::min(unit.end, begin + kSpanTokens));
  const auto token_bytes = static_cast<std::int64_t>(unit.heads * head_dim_ * ItemSize(args_.kv.dtype));
  const std::int64_t tokens = std::clamp<std::int64_t>(kStartBytes / token_bytes, 1, kTileTokens);
  context.PrefetchKeys(begin, std::min(unit.end, begin + tokens));
}

// Computes the state of a span. next: the item that this worker probably takes afterwards, or null.
void Attention::RunSpan(const WorkUnit& unit, std::int64_t span, const WorkItem* next, float* scratchpad,
                        float* state) const {
  const std::int64_t tokens = SpanTokens(unit);
  const std::int64_t first = std::max(unit.begin, span * tokens), end = std::min(unit.end, (span + 1) * tokens);
  for (std::int64_t begin = first; begin < end;) {
    const std::int64_t part_end = std::min((begin / kSpanTokens + 1) * kSpanTokens, end);
    RunPart(unit, begin, part_end, begin > first, part_end == end ? next : nullptr, scratchpad, state);
    begin = part_end;
  }
}

// Part of a span: at most kSpanTokens, between two multiples of kSpanTokens.
void Attention::RunPart(const WorkUnit& unit, std::int64_t begin, std::int64_t end, bool resume, const WorkItem* next,
                        float* scratchpad, float* state) const {
  const KVView& kv = args_.kv;
  SpanArgs span_args;
  span_args.tile = Tile(unit);
  span_args.begin = begin;
  span_args.end = end;
  const Context context = ContextOf(unit);
  // What is to be prefetched after it.
  const WorkUnit& next_unit = next == nullptr ? unit : plan_.units[next->unit];
  const Context next_context = ContextOf(next_unit);
  const std::int64_t next_begin = next == nullptr ? end : FirstPosition(next_unit, *next);
  const std::int64_t next_end = std::min(next_unit.end, next_begin + kLookahead);
  const auto list = [&](int which, std::int64_t place) {
    const auto rows = reinterpret_cast<const char**>(scratchpad + place);
    next_context.List(which, next_begin, next_end, context.List(which, begin, end, rows));
    return rows;
  };
  span_args.keys = span_args.values = list(0, layout_.keys);
  span_args.readable = end + std::max<std::int64_t>(next_end - next_begin, 0);
  span_args.value_offset = kv.kv_stride;
  if (kv.values_apart()) {
    span_args.values = list(1, layout_.values);
    span_args.value_offset = 0;
  }
  span_args.head_stride = kv.head_stride;
  if (IsQuantized(kv.dtype)) {
    context.LoadScales(begin, end, scratchpad + layout_.scales);
    span_args.scales = scratchpad + layout_.scales;
    next_context.PrefetchScales(next_begin, std::min(next_unit.end, next_begin + kSpanTokens));
  }
  span_args.dtype = kv.dtype;
  span_args.heads = unit.heads;
  span_args.q = scratchpad + layout_.queries;
  span_args.q_is_bf16 = args_.q_dtype == DType::kBF16;
  span_args.positions = reinterpret_cast<const std::int32_t*>(scratchpad + layout_.positions);
  if (args_.options.alibi_slopes != nullptr) span_args.slopes = args_.options.alibi_slopes + unit.kv_head * group_;
  span_args.exact_weights = args_.options.exact_weights;
  span_args.scale = args_.options.scale;
  span_args.soft_cap = args_.options.soft_cap;
  span_args.window = window_;
  span_args.scratch = scratchpad + layout_.scratch;
  span_args.state = state;
  span_args.resume = resume;
  kernels_.attend(span_args);
}

void Attention::Merge(const WorkUnit& unit, float* into, const float* from) const {
  const std::int64_t stride = StateFloats(unit.rows, head_dim_);
  for (int h = 0; h < unit.heads; ++h) {
    kernels_.merge(into + h * stride, from + h * stride, unit.rows, head_dim_, state_scale_);
  }
}

void Attention::Finish(const WorkUnit& unit, const float* state) const {
  const std::int64_t stride = StateFloats(unit.rows, head_dim_);
  for (int h = 0; h < unit.heads; ++h) {
    FinishArgs finish;
    finish.tile = Tile(unit);
    finish.kv_head = unit.kv_head + h;
    finish.state = state + h * stride;
    finish.state_scale = state_scale_;
    finish.sinks = args_.options.sinks;
    finish.out = QueryRow(args_.out, unit);
    finish.dtype = args_.q_dtype;
    if (args_.lse != nullptr) {
      finish.lse = args_.lse + std::int64_t{(*args_.sequences)[unit.sequence].query_begin} * args_.num_q_heads;
    }
    kernels_.finish(finish);
  }
}

void Attention::LoadQueries(const WorkUnit& unit, float* scratchpad) const {
  for (int h = 0; h < unit.heads; ++h) {
    LoadArgs load;
    load.tile = Tile(unit);
    load.kv_head = unit.kv_head + h;
    load.q = QueryRow(args_.q, unit);
    load.dtype = args_.q_dtype;
    load.kv_dtype = args_.kv.dtype;
    load.exact_weights = args_.options.exact_weights;
    load.dst = scratchpad + layout_.queries + h * QueryFloats(unit.rows, head_dim_);
    kernels_.load(load);
  }
  auto* positions = reinterpret_cast<std::int32_t*>(scratchpad + layout_.positions);
  const std::int32_t position = (*args_.sequences)[unit.sequence].position;
  for (int r = 0; r < unit.rows; ++r) {
    positions[r] = position + static_cast<std::int32_t>((unit.first_row + r) / group_);
  }
}

void Attention::Run(std::int64_t index, int worker) const {
  const WorkItem& item = plan_.items[index];
  WorkUnit& unit = plan_.units[item.unit];
  float* scratchpad = scratchpads_ + worker * layout_.size;
  PrefetchStart(item);
  LoadQueries(unit, scratchpad);

  // Items are handed out in order, and neighbours take about as long.
  const std::int64_t after = index + num_workers_;
  const WorkItem* next = after < num_items() ? &plan_.items[after] : nullptr;
  const auto next_of = [&](std::int64_t span) { return span + 1 == item.span_end ? next : nullptr; };
  if (unit.partials < 0) {
    float* state = scratchpad + layout_.state;
    float* span_state = scratchpad + layout_.span_state;
    RunSpan(unit, item.span_begin, next_of(item.span_begin), scratchpad, state);
    for (int span = item.span_begin + 1; span < item.span_end; ++span) {
      RunSpan(unit, span, next_of(span), scratchpad, span_state);
      Merge(unit, state, span_state);
    }
    Finish(unit, state);
    return;
  }
  const std::int64_t first = unit.begin / SpanTokens(unit);
  const std::int64_t stride = UnitStateFloats(unit, head_dim_);
  float* partials = partials_ + unit.partials;
  for (int span = item.span_begin; span < item.span_end; ++span) {
    RunSpan(unit, span, next_of(span), scratchpad, partials + (span - first) * stride);
  }
  // The reduction, by the last item of the unit.
  if (unit.unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::int64_t spans = (unit.end - 1) / SpanTokens(unit) + 1 - first;
  for (std::int64_t span = 1; span < spans; ++span) Merge(unit, partials, partials + span * stride);
  Finish(unit, partials);
}

// Clears the outputs of tokens that no sequence owns.
void ClearRest(const AttentionArgs& args) {
  const std::int64_t row = std::int64_t{args.num_q_heads} * args.kv.head_dim;
  const auto row_bytes = static_cast<std::int64_t>(row * ItemSize(args.q_dtype));
  const auto clear = [&](std::int64_t from, std::int64_t to) {
    if (from >= to) return;
    std::memset(static_cast<char*>(args.out) + from * row_bytes, 0, (to - from) * row_bytes);
    if (args.lse != nullptr) {
      std::fill(args.lse + from * args.num_q_heads, args.lse + to * args.num_q_heads,
                -std::numeric_limits<float>::infinity());
    }
  };
  std::int64_t owned = 0;
  for (const Sequence& sequence : *args.sequences) {
    clear(owned, sequence.query_begin);
    owned = std::int64_t{sequence.query_begin} + sequence.query_length;
  }
  clear(owned, args.num_tokens);
}

}  // namespace

Status Attend(const AttentionArgs& args, Parallel& parallel) {
  ClearRest(args);
  if (args.sequences->empty()) return {};
  WorkspaceLoan loan;
  MakePlan(args, parallel.num_workers(), &(*loan).plan);
  Attention attention(args, *loan);
  Inline here;
  Parallel& runner = (*loan).plan.cost < kInlineCost ? here : parallel;
  if (!attention.Allocate(runner.num_workers())) {
    return ResourceExhausted("attention: no memory for the workspace of " + std::to_string(attention.num_items()) +
                             " tasks; use a smaller batch or fewer threads");
  }
  runner.For(attention.num_items(), [&](std::int64_t item, int worker) { attention.Run(item, worker); });
  return {};
}

}  // namespace kvpage::cpu
