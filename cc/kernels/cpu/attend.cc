// Attention: plans a ragged batch (plan.h) and runs its work items.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/cpu/attention.h"

namespace kvpage::cpu {
namespace {

// At most this many bytes of keys are prefetched before an item begins. More would not arrive any sooner.
constexpr int kStartBytes = 16384;

}  // namespace

Attention::Attention(const AttentionArgs& args, Workspace& workspace)
    : args_(args),
      workspace_(workspace),
      plan_(workspace.plan),
      kernels_(ActiveKernels()),
      group_(args.num_q_heads / args.kv.num_kv_heads),
      head_dim_(args.kv.head_dim),
      window_(SlidingWindow(args)),
      state_scale_(StateScale(args.options.scale, args.options.soft_cap, args.options.alibi_slopes != nullptr)) {}

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
  constexpr std::int64_t kLine = 16;  // floats per cache line
  std::int64_t* end = &layout_.member_size;
  const auto place = [&](std::int64_t floats) {
    const std::int64_t here = *end;
    *end += (floats + kLine - 1) / kLine * kLine;
    return here;
  };
  layout_.member_queries = place(plan_.member_query_floats);
  layout_.member_positions = place(kDecodeRows);
  layout_.member_state = place(plan_.member_state_floats);
  end = &layout_.size;
  layout_.queries = place(plan_.query_floats);
  layout_.state = place(plan_.state_floats);
  layout_.span_state = place(plan_.state_floats);
  layout_.scratch = place(plan_.scratch_floats);
  layout_.positions = place(kMaxRows);
  constexpr auto kListFloats = (kSpanTokens + kLookahead) * static_cast<std::int64_t>(sizeof(char*) / sizeof(float));
  layout_.keys = place(kListFloats);
  layout_.values = args_.kv.values_apart() ? place(kListFloats) : layout_.keys;
  layout_.scales = place(plan_.scale_floats);
  layout_.members = place(plan_.most_members * layout_.member_size);
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

// The first data that an item reads.
Lookahead Attention::StartOf(const WorkItem& item) const {
  const WorkUnit& unit = plan_.units[item.unit];
  return {ContextOf(unit), FirstPosition(unit, item), unit.end};
}

// Prefetches the first bytes that an item reads. The kernels prefetch as they run; this covers the time before they
// start, while queries are converted and addresses are listed.
void Attention::PrefetchStart(const WorkItem& item) const {
  const Lookahead start = StartOf(item);
  const std::int64_t begin = start.begin;
  if (IsQuantized(args_.kv.dtype)) start.context.PrefetchScales(begin, std::min(start.end, begin + kSpanTokens));
  const auto token_bytes = static_cast<std::int64_t>(start.context.heads() * head_dim_ * ItemSize(args_.kv.dtype));
  const std::int64_t tokens = std::clamp<std::int64_t>(kStartBytes / token_bytes, 1, kTileTokens);
  start.context.PrefetchKeys(begin, std::min(start.end, begin + tokens));
}

// Computes the softmax state of a span. `next` is the item that this worker will probably run afterwards, or null.
void Attention::RunSpan(const LoadedRows& rows, std::int64_t span, const WorkItem* next, float* scratchpad,
                        float* state) const {
  const WorkUnit& unit = *rows.unit;
  const std::int64_t tokens = SpanTokens(unit);
  const std::int64_t first = std::max(unit.begin, span * tokens), end = std::min(unit.end, (span + 1) * tokens);
  for (std::int64_t begin = first; begin < end;) {
    const std::int64_t part_end = std::min((begin / kSpanTokens + 1) * kSpanTokens, end);
    const Lookahead ahead =
        part_end == end && next != nullptr ? StartOf(*next) : Lookahead{ContextOf(unit), part_end, unit.end};
    RunPart(rows, {begin, part_end, begin > first, part_end < end}, ahead, scratchpad, state);
    begin = part_end;
  }
}

void Attention::RunPart(const LoadedRows& rows, const SpanPart& part, const Lookahead& next, float* scratchpad,
                        float* state) const {
  const KVView& kv = args_.kv;
  SpanArgs span_args;
  span_args.tile = Tile(*rows.unit);
  span_args.begin = part.begin;
  span_args.end = part.end;
  const Context context = ContextOf(*rows.source);
  const std::int64_t next_end = std::min(next.end, next.begin + kLookahead);
  const auto list = [&](int which, std::int64_t place) {
    const auto list_rows = reinterpret_cast<const char**>(scratchpad + place);
    next.context.List(which, next.begin, next_end, context.List(which, part.begin, part.end, list_rows));
    return list_rows;
  };
  span_args.keys = span_args.values = list(0, layout_.keys);
  span_args.readable = part.end + std::max<std::int64_t>(next_end - next.begin, 0);
  span_args.value_offset = kv.kv_stride;
  if (kv.values_apart()) {
    span_args.values = list(1, layout_.values);
    span_args.value_offset = 0;
  }
  span_args.head_stride = kv.head_stride;
  if (IsQuantized(kv.dtype)) {
    context.LoadScales(part.begin, part.end, scratchpad + layout_.scales);
    span_args.scales = scratchpad + layout_.scales;
    next.context.PrefetchScales(next.begin, std::min(next.end, next.begin + kSpanTokens));
  }
  span_args.dtype = kv.dtype;
  span_args.heads = rows.unit->heads;
  span_args.q = rows.queries;
  span_args.q_is_bf16 = args_.q_dtype == DType::kBF16;
  span_args.positions = rows.positions;
  if (args_.options.alibi_slopes != nullptr)
    span_args.slopes = args_.options.alibi_slopes + rows.unit->kv_head * group_;
  span_args.exact_weights = args_.options.exact_weights;
  span_args.scale = args_.options.scale;
  span_args.soft_cap = args_.options.soft_cap;
  span_args.window = window_;
  span_args.scratch = scratchpad + layout_.scratch;
  span_args.state = state;
  span_args.resume = part.resume;
  span_args.more = part.more;
  kernels_.attend(span_args);
}

float* Attention::PartialState(const WorkUnit& unit, std::int64_t span, bool* folds) const {
  const std::int64_t index = std::max<std::int64_t>(0, span - FirstSpan(unit) - unit.folded + 1);
  *folds = index == 0 && span > FirstSpan(unit);
  return partials_ + unit.partials + index * UnitStateFloats(unit, head_dim_);
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

void Attention::LoadQueries(const LoadedRows& rows) const {
  const WorkUnit& unit = *rows.unit;
  for (int h = 0; h < unit.heads; ++h) {
    LoadArgs load;
    load.tile = Tile(unit);
    load.kv_head = unit.kv_head + h;
    load.q = QueryRow(args_.q, unit);
    load.dtype = args_.q_dtype;
    load.kv_dtype = args_.kv.dtype;
    load.exact_weights = args_.options.exact_weights;
    load.dst = rows.queries + h * QueryFloats(unit.rows, head_dim_);
    kernels_.load(load);
  }
  const Sequence& sequence = (*args_.sequences)[unit.sequence];
  for (int r = 0; r < unit.rows; ++r) {
    rows.positions[r] = LastVisible(args_, sequence, (unit.first_row + r) / group_);
  }
}

void Attention::Run(std::int64_t index, int worker) const {
  const WorkItem& item = plan_.items[index];
  float* scratchpad = scratchpads_ + worker * layout_.size;
  PrefetchStart(item);
  // Workers take items in order, and neighbouring items take about the same time.
  const std::int64_t after = index + num_workers_;
  const WorkItem* next = after < num_items() ? &plan_.items[after] : nullptr;
  item.num_members > 0 ? RunGroup(item, next, scratchpad) : RunUnit(item, next, scratchpad);
}

void Attention::RunUnit(const WorkItem& item, const WorkItem* next, float* scratchpad) const {
  WorkUnit& unit = plan_.units[item.unit];
  const LoadedRows rows = {&unit, &unit, scratchpad + layout_.queries,
                           reinterpret_cast<std::int32_t*>(scratchpad + layout_.positions)};
  LoadQueries(rows);
  float* span_state = scratchpad + layout_.span_state;
  for (int span = item.span_begin; span < item.span_end; ++span) {
    bool folds = span > item.span_begin;
    float* state = unit.partials < 0 ? scratchpad + layout_.state : PartialState(unit, span, &folds);
    RunSpan(rows, span, span + 1 == item.span_end ? next : nullptr, scratchpad, folds ? span_state : state);
    if (folds) Merge(unit, state, span_state);
  }
  unit.partials < 0 ? Finish(unit, scratchpad + layout_.state) : EndItem(&unit);
}

void Attention::EndItem(WorkUnit* unit) const {
  if (unit->unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::int64_t stride = UnitStateFloats(*unit, head_dim_);
  const std::int64_t states = LastSpan(*unit) - FirstSpan(*unit) - unit->folded + 1;
  float* partials = partials_ + unit->partials;
  for (std::int64_t i = 1; i < states; ++i) Merge(*unit, partials, partials + i * stride);
  Finish(*unit, partials);
}

namespace {

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
