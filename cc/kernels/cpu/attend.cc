// Attention: cuts a ragged batch into tasks, runs them, merges what was cut.
//
// A unit is a sequence, a KV head and a tile of query rows. Its context is cut at multiples of SpanTokens(), every span
// gives a state of its own (max, sum, weighted values), and states are merged in the order of the spans: by the task
// that ran them all, or, when a long context was shared out, by whichever task of the unit ends last. Both do the same
// arithmetic, so how many tasks a unit became never shows in the result.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cpu/context.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/workspace.h"

namespace kvpage::cpu {
namespace {

// Below this much work (in the units of Cost(), some 10 microseconds) waking another thread costs more than it brings.
constexpr double kInlineCost = 1 << 18;
// Tasks that a worker should get, so that those with short contexts can even out those with long ones.
constexpr int kTasksPerWorker = 4;
// The same for heads that could be walked together: fewer, because every split of a token's row costs speed.
constexpr int kHeadTasksPerWorker = 2;
// How much of its keys to prefetch before a task begins, at most. More would arrive no sooner.
constexpr int kStartBytes = 16384;

// Tokens that one state covers. Merging costs many rows more, and they have less need of being shared out: a unit with
// many rows has much work for every token, and there are other units. The kernels take them in steps of kSpanTokens.
int SpanTokens(const Unit& unit) { return unit.rows <= kDecodeRows ? kSpanTokens : 4 * kSpanTokens; }

// Rows of the units that a sequence with many rows becomes. Large ones, because each packs the keys and values that it
// sees; but enough of them to keep all threads busy, and not by the number of threads: that must not show in the
// result.
std::int64_t UnitRows(std::int64_t rows) {
  constexpr std::int64_t kUnits = 8, kLeastRows = 16 * kRowBlock;
  const std::int64_t wanted = (rows + kUnits - 1) / kUnits;
  return std::clamp<std::int64_t>((wanted + kRowBlock - 1) / kRowBlock * kRowBlock, kLeastRows, kMaxRows);
}

// Where things lie in a worker's part of the workspace, in floats.
struct WorkerLayout {
  std::int64_t queries = 0;
  std::int64_t state = 0;
  std::int64_t span_state = 0;
  std::int64_t scratch = 0;
  std::int64_t positions = 0;
  std::int64_t keys = 0;
  std::int64_t scales = 0;
  std::int64_t size = 0;
};

class Attention {
 public:
  Attention(const AttentionArgs& args, Workspace& workspace)
      : args_(args),
        workspace_(workspace),
        kernels_(ActiveKernels()),
        group_(args.num_q_heads / args.kv.num_kv_heads),
        head_dim_(args.kv.head_dim),
        window_(args.options.sliding_window != nullptr ? *args.options.sliding_window : 0) {}

  // Lists units and tasks; returns the work in all.
  double Plan(int num_workers);
  bool Allocate(int num_workers);
  void Run(std::int64_t index, int worker) const;
  std::int64_t FirstPosition(const Task& task) const {
    const Unit& unit = workspace_.units[task.unit];
    return std::max<std::int64_t>(unit.begin, task.span_begin * std::int64_t{SpanTokens(unit)});
  }
  std::int64_t num_tasks() const { return static_cast<std::int64_t>(workspace_.tasks.size()); }

 private:
  int HeadsTogether(int num_workers) const;
  void AddUnits(std::int32_t index, int heads_together);
  double Cost(const Unit& unit) const;
  QueryTile Tile(const Unit& unit) const;
  std::int64_t UnitStateFloats(const Unit& unit) const { return unit.heads * StateFloats(unit.rows, head_dim_); }
  Context ContextOf(const Unit& unit) const {
    return Context(args_.kv, args_.layer, (*args_.sequences)[unit.sequence].slot, unit.kv_head, unit.heads);
  }
  void PrefetchStart(const Task& task) const;
  void RunSpan(const Unit& unit, std::int64_t span, const Task* next, float* worker, float* state) const;
  void RunPart(const Unit& unit, std::int64_t begin, std::int64_t end, bool resume, const Task* next, float* worker,
               float* state) const;
  void Merge(const Unit& unit, float* into, const float* from) const;
  void Finish(const Unit& unit, const float* state) const;
  char* QueryRow(const void* base, const Unit& unit) const;

  const AttentionArgs& args_;
  Workspace& workspace_;
  const Kernels& kernels_;
  const int group_;
  const int head_dim_;
  const std::int32_t window_;
  int num_workers_ = 1;
  WorkerLayout layout_;
  std::int64_t partial_floats_ = 0;
  float* floats_ = nullptr;
};

double Attention::Cost(const Unit& unit) const {
  // Reading the context, and what every row does with it.
  const double tokens = static_cast<double>(unit.end - unit.begin);
  return tokens * unit.heads * head_dim_ * (2.0 * ItemSize(args_.kv.dtype) + unit.rows);
}

QueryTile Attention::Tile(const Unit& unit) const {
  QueryTile tile;
  tile.rows = unit.rows;
  tile.first_row = unit.first_row;
  tile.group = group_;
  tile.num_q_heads = args_.num_q_heads;
  tile.head_dim = head_dim_;
  return tile;
}

// Few rows are bound by memory: where the heads of a token are neighbours they are read together, unless the contexts
// are so short that not every worker would get some.
int Attention::HeadsTogether(int num_workers) const {
  const KVView& kv = args_.kv;
  if (kv.num_kv_heads == 1 || kv.head_stride >= kv.token_stride) return 1;
  std::int64_t spans = 0;
  for (const Sequence& s : *args_.sequences) spans += (s.position + s.query_length + kSpanTokens - 1) / kSpanTokens;
  int heads = std::min(kv.num_kv_heads, kMaxHeads);
  const std::int64_t wanted = num_workers == 1 ? 1 : kHeadTasksPerWorker * std::int64_t{num_workers};
  while (heads > 2 && (kv.num_kv_heads + heads - 1) / heads * spans < wanted) heads = (heads + 1) / 2;
  return heads;
}

void Attention::AddUnits(std::int32_t index, int heads_together) {
  const Sequence& sequence = (*args_.sequences)[index];
  const KVView& kv = args_.kv;
  const std::int64_t rows = std::int64_t{sequence.query_length} * group_;
  const int heads = rows <= kDecodeRows ? heads_together : 1;
  const std::int64_t unit_rows = UnitRows(rows);
  const std::int64_t tiles = (rows + unit_rows - 1) / unit_rows;
  // Later rows see more: the long units come first and the short ones fill the gaps.
  for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
    for (int head = 0; head < kv.num_kv_heads; head += heads) {
      Unit unit;
      unit.sequence = index;
      unit.kv_head = head;
      unit.heads = std::min(heads, kv.num_kv_heads - head);
      unit.first_row = tile * unit_rows;
      unit.rows = static_cast<std::int32_t>(std::min(unit_rows, rows - unit.first_row));
      unit.end = sequence.position + (unit.first_row + unit.rows - 1) / group_ + 1;
      if (window_ > 0) {
        unit.begin = std::max<std::int64_t>(0, sequence.position + unit.first_row / group_ - std::int64_t{window_} + 1);
      }
      workspace_.units.push_back(unit);
    }
  }
}

double Attention::Plan(int num_workers) {
  std::vector<Unit>& units = workspace_.units;
  std::vector<Task>& tasks = workspace_.tasks;
  std::vector<std::int32_t>& order = workspace_.order;
  units.clear();
  tasks.clear();
  order.clear();
  const std::vector<Sequence>& sequences = *args_.sequences;
  for (std::size_t i = 0; i < sequences.size(); ++i) order.push_back(static_cast<std::int32_t>(i));
  const auto end_of = [&](std::int32_t i) { return std::int64_t{sequences[i].position} + sequences[i].query_length; };
  std::sort(order.begin(), order.end(),
            [&](std::int32_t a, std::int32_t b) { return end_of(a) != end_of(b) ? end_of(a) > end_of(b) : a < b; });
  const int heads_together = HeadsTogether(num_workers);
  for (const std::int32_t index : order) AddUnits(index, heads_together);

  double total = 0;
  for (const Unit& unit : units) total += Cost(unit);
  const double wanted = total / (double{kTasksPerWorker} * num_workers);
  const bool share = num_workers > 1 && total >= kInlineCost;
  for (std::size_t i = 0; i < units.size(); ++i) {
    Unit& unit = units[i];
    const auto first = static_cast<std::int32_t>(unit.begin / SpanTokens(unit));
    const auto last = static_cast<std::int32_t>((unit.end - 1) / SpanTokens(unit) + 1);
    const int spans = last - first;
    const double pieces = share ? Cost(unit) / wanted : 1.0;
    const int spans_per_task = pieces <= 1.0 ? spans : std::max(1, static_cast<int>(spans / pieces));
    for (int span = first; span < last; span += spans_per_task) {
      tasks.push_back({static_cast<std::int32_t>(i), span, std::min(span + spans_per_task, last)});
    }
    const int parts = (spans + spans_per_task - 1) / spans_per_task;
    if (parts > 1) {
      unit.partials = partial_floats_;
      partial_floats_ += spans * UnitStateFloats(unit);
      unit.unfinished.store(parts, std::memory_order_relaxed);
    }
    layout_.queries = std::max(layout_.queries, unit.heads * QueryFloats(unit.rows, head_dim_));
    layout_.state = std::max(layout_.state, UnitStateFloats(unit));
    layout_.scratch = std::max(layout_.scratch, ScratchFloats(unit.rows, head_dim_, unit.heads));
    if (IsQuantized(args_.kv.dtype)) {
      layout_.scales = std::max<std::int64_t>(layout_.scales, std::int64_t{unit.heads} * 2 * kSpanScales);
    }
  }
  return total;
}

bool Attention::Allocate(int num_workers) {
  num_workers_ = num_workers;
  constexpr std::int64_t kLine = 16;
  const auto round = [](std::int64_t floats) { return (floats + kLine - 1) / kLine * kLine; };
  std::int64_t at = 0;
  const auto place = [&](std::int64_t floats) {
    const std::int64_t here = at;
    at += round(floats);
    return here;
  };
  WorkerLayout layout;
  layout.queries = place(layout_.queries);
  layout.state = place(layout_.state);
  layout.span_state = place(layout_.state);
  layout.scratch = place(layout_.scratch);
  layout.positions = place(kMaxRows);
  layout.keys = place((kSpanTokens + kLookahead) * static_cast<std::int64_t>(sizeof(char*) / sizeof(float)));
  layout.scales = place(layout_.scales);
  layout.size = at;
  layout_ = layout;
  const std::int64_t workers = round(layout_.size) * num_workers;
  float* floats = workspace_.Floats(workers + partial_floats_);
  if (floats == nullptr) return false;
  for (Unit& unit : workspace_.units) {
    if (unit.partials >= 0) unit.partials += workers;
  }
  floats_ = floats;
  return true;
}

char* Attention::QueryRow(const void* base, const Unit& unit) const {
  const std::int64_t token = (*args_.sequences)[unit.sequence].query_begin;
  const auto row_bytes = static_cast<std::int64_t>(head_dim_ * ItemSize(args_.q_dtype));
  return const_cast<char*>(static_cast<const char*>(base)) + token * args_.num_q_heads * row_bytes;
}

// What a task reads first. The kernels prefetch as they go, but cannot before they have begun: meanwhile queries are
// converted and addresses listed.
void Attention::PrefetchStart(const Task& task) const {
  const Unit& unit = workspace_.units[task.unit];
  const Context context = ContextOf(unit);
  const std::int64_t begin = FirstPosition(task);
  if (IsQuantized(args_.kv.dtype)) context.PrefetchScales(begin, std::min(unit.end, begin + kSpanTokens));
  const auto token_bytes = static_cast<std::int64_t>(unit.heads * head_dim_ * ItemSize(args_.kv.dtype));
  const std::int64_t tokens = std::clamp<std::int64_t>(kStartBytes / token_bytes, 1, kTileTokens);
  context.PrefetchKeys(begin, std::min(unit.end, begin + tokens));
}

// next: what this worker probably does after it.
void Attention::RunSpan(const Unit& unit, std::int64_t span, const Task* next, float* worker, float* state) const {
  const std::int64_t tokens = SpanTokens(unit);
  const std::int64_t first = std::max(unit.begin, span * tokens), end = std::min(unit.end, (span + 1) * tokens);
  for (std::int64_t begin = first; begin < end;) {
    const std::int64_t part_end = std::min((begin / kSpanTokens + 1) * kSpanTokens, end);
    RunPart(unit, begin, part_end, begin > first, part_end == end ? next : nullptr, worker, state);
    begin = part_end;
  }
}

// At most kSpanTokens, all in one cut between multiples of it.
void Attention::RunPart(const Unit& unit, std::int64_t begin, std::int64_t end, bool resume, const Task* next,
                        float* worker, float* state) const {
  const KVView& kv = args_.kv;
  SpanArgs span_args;
  span_args.tile = Tile(unit);
  span_args.begin = begin;
  span_args.end = end;
  const auto keys = reinterpret_cast<const char**>(worker + layout_.keys);
  const Context context = ContextOf(unit);
  const char** last = context.ListKeys(begin, end, keys);
  // What to prefetch after it.
  const Unit& next_unit = next == nullptr ? unit : workspace_.units[next->unit];
  const Context next_context = ContextOf(next_unit);
  const std::int64_t next_begin = next == nullptr ? end : FirstPosition(*next);
  last = next_context.ListKeys(next_begin, std::min(next_unit.end, next_begin + kLookahead), last);
  span_args.readable = begin + (last - keys);
  span_args.keys = keys;
  span_args.value_offset = kv.kv_stride;
  span_args.head_stride = kv.head_stride;
  if (IsQuantized(kv.dtype)) {
    context.LoadScales(begin, end, worker + layout_.scales);
    span_args.scales = worker + layout_.scales;
    next_context.PrefetchScales(next_begin, std::min(next_unit.end, next_begin + kSpanTokens));
  }
  span_args.dtype = kv.dtype;
  span_args.heads = unit.heads;
  span_args.q = worker + layout_.queries;
  span_args.q_is_bf16 = args_.q_dtype == DType::kBF16;
  span_args.positions = reinterpret_cast<const std::int32_t*>(worker + layout_.positions);
  if (args_.options.alibi_slopes != nullptr) span_args.slopes = args_.options.alibi_slopes + unit.kv_head * group_;
  span_args.exact_weights = args_.options.exact_weights;
  span_args.scale = args_.options.scale;
  span_args.soft_cap = args_.options.soft_cap;
  span_args.window = window_;
  span_args.scratch = worker + layout_.scratch;
  span_args.state = state;
  span_args.resume = resume;
  kernels_.attend(span_args);
}

void Attention::Merge(const Unit& unit, float* into, const float* from) const {
  const std::int64_t stride = StateFloats(unit.rows, head_dim_);
  for (int h = 0; h < unit.heads; ++h) {
    kernels_.merge(into + h * stride, from + h * stride, unit.rows, head_dim_);
  }
}

void Attention::Finish(const Unit& unit, const float* state) const {
  const std::int64_t stride = StateFloats(unit.rows, head_dim_);
  for (int h = 0; h < unit.heads; ++h) {
    FinishArgs finish;
    finish.tile = Tile(unit);
    finish.kv_head = unit.kv_head + h;
    finish.state = state + h * stride;
    finish.sinks = args_.options.sinks;
    finish.out = QueryRow(args_.out, unit);
    finish.dtype = args_.q_dtype;
    if (args_.lse != nullptr) {
      finish.lse = args_.lse + std::int64_t{(*args_.sequences)[unit.sequence].query_begin} * args_.num_q_heads;
    }
    kernels_.finish(finish);
  }
}

void Attention::Run(std::int64_t index, int worker_index) const {
  const Task& task = workspace_.tasks[index];
  Unit& unit = workspace_.units[task.unit];
  float* worker = floats_ + worker_index * layout_.size;
  PrefetchStart(task);
  for (int h = 0; h < unit.heads; ++h) {
    LoadArgs load;
    load.tile = Tile(unit);
    load.kv_head = unit.kv_head + h;
    load.q = QueryRow(args_.q, unit);
    load.dtype = args_.q_dtype;
    load.kv_dtype = args_.kv.dtype;
    load.exact_weights = args_.options.exact_weights;
    load.dst = worker + layout_.queries + h * QueryFloats(unit.rows, head_dim_);
    kernels_.load(load);
  }
  auto* positions = reinterpret_cast<std::int32_t*>(worker + layout_.positions);
  const std::int32_t position = (*args_.sequences)[unit.sequence].position;
  for (int r = 0; r < unit.rows; ++r)
    positions[r] = position + static_cast<std::int32_t>((unit.first_row + r) / group_);

  // Tasks are handed out in order, and those that are next to each other take about as long.
  const std::int64_t after = index + num_workers_;
  const Task* next = after < num_tasks() ? &workspace_.tasks[after] : nullptr;
  const auto next_of = [&](std::int64_t span) { return span + 1 == task.span_end ? next : nullptr; };
  float* state = worker + layout_.state;
  if (unit.partials < 0) {
    float* span_state = worker + layout_.span_state;
    RunSpan(unit, task.span_begin, next_of(task.span_begin), worker, state);
    for (int span = task.span_begin + 1; span < task.span_end; ++span) {
      RunSpan(unit, span, next_of(span), worker, span_state);
      Merge(unit, state, span_state);
    }
    Finish(unit, state);
    return;
  }
  const std::int64_t first = unit.begin / SpanTokens(unit);
  const std::int64_t stride = UnitStateFloats(unit);
  float* partials = floats_ + unit.partials;
  for (int span = task.span_begin; span < task.span_end; ++span) {
    RunSpan(unit, span, next_of(span), worker, partials + (span - first) * stride);
  }
  if (unit.unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::int64_t spans = (unit.end - 1) / SpanTokens(unit) + 1 - first;
  for (std::int64_t span = 1; span < spans; ++span) Merge(unit, partials, partials + span * stride);
  Finish(unit, partials);
}

// Tokens that no sequence owns.
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
  Attention attention(args, *loan);
  Inline here;
  Parallel* runner = &parallel;
  if (attention.Plan(parallel.num_workers()) < kInlineCost) runner = &here;
  if (!attention.Allocate(runner->num_workers())) {
    return ResourceExhausted("attention: no memory for the workspace of " + std::to_string(attention.num_tasks()) +
                             " tasks; use a smaller batch or fewer threads");
  }
  runner->For(attention.num_tasks(), [&](std::int64_t task, int worker) { attention.Run(task, worker); });
  return {};
}

}  // namespace kvpage::cpu
