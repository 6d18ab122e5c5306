// Attention: what one Attend call keeps while its work items run.
//
// Every span of a unit gives a softmax state, and states are merged in the order of the spans: by the item that ran
// them all, or, when a context was shared out, by the item of the unit that ends last. Both do the same arithmetic, so
// neither the number of items nor what a unit walks together with others ever shows in the result.
#ifndef KVPAGE_KERNELS_CPU_ATTENTION_H_
#define KVPAGE_KERNELS_CPU_ATTENTION_H_

#include <cstdint>

#include "kernels/cpu/context.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/workspace.h"

namespace kvpage::cpu {

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
  std::int64_t members = 0;  // of a group's item: queries, positions and the state of a span, for each
  std::int64_t member_queries = 0, member_positions = 0, member_state = 0, member_size = 0;
  std::int64_t size = 0;
};

// The query rows of a unit, loaded.
struct LoadedRows {
  const WorkUnit* unit;
  const WorkUnit* source;  // the unit through whose mapping keys and values are read; mostly the same
  float* queries;
  std::int32_t* positions;
};

// A part of a span: at most kSpanTokens, between two multiples of kSpanTokens. `resume` and `more`: see SpanArgs.
struct SpanPart {
  std::int64_t begin;
  std::int64_t end;
  bool resume;
  bool more;
};

// Keys to prefetch: those from `begin` on, none where end <= begin.
struct Lookahead {
  Context context;
  std::int64_t begin;
  std::int64_t end;
};

class Attention {
 public:
  Attention(const AttentionArgs& args, Workspace& workspace);

  bool Allocate(int num_workers);
  void Run(std::int64_t index, int worker) const;
  std::int64_t num_items() const { return static_cast<std::int64_t>(plan_.items.size()); }

 private:
  QueryTile Tile(const WorkUnit& unit) const;
  Context ContextOf(const WorkUnit& unit) const {
    return Context(args_.kv, args_.layer, (*args_.sequences)[unit.sequence].slot, unit.kv_head, unit.heads);
  }
  Lookahead StartOf(const WorkItem& item) const;
  char* QueryRow(const void* base, const WorkUnit& unit) const;
  void PrefetchStart(const WorkItem& item) const;
  void LoadQueries(const LoadedRows& rows) const;
  void RunUnit(const WorkItem& item, const WorkItem* next, float* scratchpad) const;
  void RunSpan(const LoadedRows& rows, std::int64_t span, const WorkItem* next, float* scratchpad, float* state) const;
  void RunPart(const LoadedRows& rows, const SpanPart& part, const Lookahead& next, float* scratchpad,
               float* state) const;
  // Where the state of a span goes among the partial ones of a unit, and whether that of earlier spans is there
  // already, with which it must be merged.
  float* PartialState(const WorkUnit& unit, std::int64_t span, bool* folds) const;
  void Merge(const WorkUnit& unit, float* into, const float* from) const;
  // An item of a unit with partial states has ended; the last one reduces them.
  void EndItem(WorkUnit* unit) const;
  void Finish(const WorkUnit& unit, const float* state) const;

  // ---- attend_group.cc ----
  void RunGroup(const WorkItem& item, const WorkItem* next, float* scratchpad) const;
  std::int64_t GroupPartTokens(const WorkUnit& unit) const;
  LoadedRows Member(const WorkItem& item, int i, float* scratchpad) const;
  float* SpanStateOf(int i, float* scratchpad) const {
    return scratchpad + layout_.members + i * layout_.member_size + layout_.member_state;
  }
  void RunGroupSpan(const WorkItem& item, std::int64_t span, const WorkItem* next, float* scratchpad) const;

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

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_ATTENTION_H_
