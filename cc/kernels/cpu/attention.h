// Attention: the state of one Attend call while its work items run.
//
// Every span of a unit produces a softmax state. The states are merged in the order of the spans: by the item that ran
// all of them or, if a context was split, by the unit's last item to finish. The arithmetic is the same in both cases,
// so results depend neither on the number of items nor on which units are processed together.
#ifndef KVPAGE_KERNELS_CPU_ATTENTION_H_
#define KVPAGE_KERNELS_CPU_ATTENTION_H_

#include <cstdint>

#include "kernels/cpu/context.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/workspace.h"

namespace kvpage::cpu {

// Offsets, in floats, into a worker's scratchpad, which is its part of the workspace.
struct ScratchpadLayout {
  std::int64_t queries = 0;
  std::int64_t state = 0;
  std::int64_t span_state = 0;
  std::int64_t scratch = 0;
  std::int64_t positions = 0;
  std::int64_t keys = 0;
  std::int64_t values = 0;
  std::int64_t scales = 0;
  std::int64_t members = 0;  // of a group's item: queries, positions and the state of a span for each member
  std::int64_t member_queries = 0, member_positions = 0, member_state = 0, member_size = 0;
  std::int64_t size = 0;
};

// The query rows of a unit, as loaded by LoadQueries.
struct LoadedRows {
  const WorkUnit* unit;
  const WorkUnit* source;  // keys and values are read through this unit's mapping; usually the same as `unit`
  float* queries;
  std::int32_t* positions;
};

// Part of a span: at most kSpanTokens, between two multiples of kSpanTokens. For `resume` and `more` see SpanArgs.
struct SpanPart {
  std::int64_t begin;
  std::int64_t end;
  bool resume;
  bool more;
};

// Keys to prefetch: positions [begin, end), none if end <= begin.
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
  // Returns where the state of a span is stored among the partial states of a unit. *folds: that place already holds
  // the merged state of earlier spans, so the new state must be merged into it.
  float* PartialState(const WorkUnit& unit, std::int64_t span, bool* folds) const;
  void Merge(const WorkUnit& unit, float* into, const float* from) const;
  // Called when an item of a unit with partial states is done; the last such item reduces the states.
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
