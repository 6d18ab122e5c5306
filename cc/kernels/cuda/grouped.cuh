// The kernel for shared prefixes: spans of physical memory that several decode sequences have in common are computed
// once for all of them, before decode (decode.cuh) computes the rest of each sequence.
//
// The planner finds groups of sequences (prefix_groups.cuh). A work item is a group, a KV head, a span, and as many
// members as have GroupRows rows together; their rows follow each other in tiles of 16. Every tile of keys and values
// is copied to shared memory once and used for all of these rows, by decode's own code and, for each row, at the same
// positions as for its sequence alone; nothing depends on other rows. So the state of a span is bit-identical to that
// without groups. States are written to memory, and decode begins by merging them in order.
//
// All rows see all tokens of a shared span, so there are no masks.
#ifndef KVPAGE_KERNELS_CUDA_GROUPED_CUH_
#define KVPAGE_KERNELS_CUDA_GROUPED_CUH_

#include <cstdint>

#include "kernels/cuda/decode.cuh"

namespace kvpage::cuda {

// Tiles of rows that are processed at a time: limited by the registers for their states and the stages for their
// queries.
template <int kDim>
inline constexpr int kMostRowTiles = kDim > 128 ? 2 : (kDim > 64 ? 3 : 4);
inline constexpr int kMostGroupRows = 4 * kTileRows;  // maximum over all head sizes

// A work item, and the current tile of tokens in it.
struct GroupItem {
  std::int32_t number;   // index among all items
  std::int32_t members;  // index of the first member in Plan::members
  std::int32_t rows_each, rows;
  std::int32_t head, slot;
  std::int32_t span, token, begin, end;

  __device__ __forceinline__ bool Done(const AttentionParams& p) const {
    return number >= p.plan.counts->group_items * p.num_kv_heads;
  }
  __device__ __forceinline__ void Start(const AttentionParams& p) {
    number = static_cast<std::int32_t>(blockIdx.x);
    if (!Done(p)) Enter(p);
  }
  __device__ __forceinline__ void Next(const AttentionParams& p, int tokens) {
    token += tokens;
    if (token < end) return;
    number += static_cast<std::int32_t>(gridDim.x);
    if (!Done(p)) Enter(p);
  }

  __device__ __forceinline__ void Enter(const AttentionParams& p) {
    const Plan& plan = p.plan;
    // Neighbouring blocks process neighbouring heads, so that together they read full tokens.
    head = number % p.num_kv_heads;
    const std::int32_t item = number / p.num_kv_heads;
    std::int32_t low = 0, high = plan.counts->groups;
    while (high - low > 1) {
      const std::int32_t middle = (low + high) / 2;
      (plan.groups[middle].items <= item ? low : high) = middle;
    }
    const PrefixGroup group = plan.groups[low];
    const Sequence leader = plan.decode_sequences[plan.members[group.first]];
    slot = leader.slot;
    rows_each = leader.query_length * p.group;
    const std::int32_t at_once = max(p.group_rows / rows_each, 1);
    const std::int32_t spans = group.span_end - group.span_begin, part = (item - group.items) / spans;
    span = group.span_begin + (item - group.items) % spans;
    members = group.first + part * at_once;
    rows = min(at_once, group.count - part * at_once) * rows_each;
    const std::int32_t shift = DecodeExtent(leader, p.checked->sliding_window, p.group).shift;
    begin = token = span << shift;
    end = (span + 1) << shift;
  }
};

template <class T, int kDim>
class GroupedAttention : public DecodeAttention<T, kDim> {
  using Base = DecodeAttention<T, kDim>;
  using Loop = typename Base::Loop;
  using Loop::kHoldQueries, Loop::kSteps, Loop::kTokens;
  using Loop::lane_, Loop::rule_, Loop::span_, Loop::p_, Loop::map_;
  using typename Loop::Rows;
  using typename Loop::State;
  static constexpr int kTiles = kMostRowTiles<kDim>;

 public:
  __device__ __forceinline__ GroupedAttention(const AttentionParams& params, unsigned char* shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void Run() {
    GroupItem item, ahead;
    item.Start(p_);
    if (item.Done(p_)) return;
    ahead = item;
    // For each row: its position, and the index of its states.
    KVPAGE_SHARED(std::int32_t[kMostGroupRows], positions);
    KVPAGE_SHARED(std::int32_t[kMostGroupRows], state_rows);
    this->range_ = {0, 0x7fffffff, 0, 0x7fffffff};  // no masks
    this->mixed_ = false;
    for (int stage = 0; stage < p_.stages - 1; ++stage) Fetch(ahead, stage);
    for (int stage = 0; !item.Done(p_);) {
      WaitForStage(p_.stages);
      __syncthreads();
      Fetch(ahead, stage == 0 ? p_.stages - 1 : stage - 1);
      if (item.token == item.begin) Begin(item, positions, state_rows);
      const bool last = item.token + kTokens >= item.end;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile * kTileRows >= item.rows) break;
        span_ = states_[tile];
        SelectRows(item, tile, positions);
        this->Tile(item.token, stage);
        if (last) {
          this->AddSums();
          Store(item, tile, state_rows);
        }
        states_[tile] = span_;
      }
      item.Next(p_, kTokens);
      stage = this->Next(stage);
    }
    WaitForCopies<0>();
  }

 private:
  __device__ __forceinline__ void Fetch(GroupItem& ahead, int stage) const {
    if (!ahead.Done(p_)) {
      const Tokens tokens(p_.checked->view, ahead.slot, p_.checked->layer, ahead.head);
      FetchTile<kDim, kTokens>(map_, tokens, ahead.token, ahead.begin, ahead.end, this->Keys(stage),
                               this->Values(stage));
      ahead.Next(p_, kTokens);
    }
    CommitCopies();
  }

  __device__ __forceinline__ std::int32_t Member(const GroupItem& item, std::int32_t row) const {
    return p_.plan.members[item.members + row / item.rows_each];
  }

  // Loads the queries of an item; those of row tile i go to stage i. They are not prefetched: an item has several tiles
  // of tokens, and other blocks of the multiprocessor keep working meanwhile.
  __device__ __forceinline__ void Begin(const GroupItem& item, std::int32_t* positions, std::int32_t* state_rows) {
    for (int row = threadIdx.x; row < kTiles * kTileRows; row += kThreads) {
      const std::int32_t known = min(row, item.rows - 1), member = Member(item, known);
      const std::int32_t own = known % item.rows_each;
      positions[row] = RowPosition(p_, p_.plan.decode_sequences[member], own);
      state_rows[row] = p_.plan.prefix_rows[member] + item.head * item.rows_each + own;
    }
    const int unit = threadIdx.x % Rows::kUnits;
    for (int row = threadIdx.x / Rows::kUnits; row < kTiles * kTileRows; row += kThreads / Rows::kUnits) {
      if (row / kTileRows * kTileRows >= item.rows) break;
      uint4 elements = {0, 0, 0, 0};
      if (row < item.rows) {
        const Sequence sequence = p_.plan.decode_sequences[Member(item, row)];
        const std::int64_t index = RowIndex(p_, sequence, item.head, row % item.rows_each);
        elements = *reinterpret_cast<const uint4*>(static_cast<const char*>(p_.q) + index * Rows::kBytes + unit * 16);
      }
      *reinterpret_cast<uint4*>(this->Queries(row / kTileRows) + Rows::Offset(row % kTileRows, unit)) = elements;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) states_[tile].Reset();
    __syncthreads();
  }

  // Selects the tile of rows that decode's code processes.
  __device__ __forceinline__ void SelectRows(const GroupItem& item, int tile, const std::int32_t* positions) {
    this->used_ = tile;
    if constexpr (kHoldQueries) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) this->LoadQueries(this->queries_[k], k);
    }
    if (rule_.plain) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * kTileRows + State::Row(lane_, half);
      this->position_[half] = positions[row];
      this->slope_[half] =
          rule_.alibi ? p_.options.alibi_slopes[RowHead(p_, item.head, min(row, item.rows - 1) % item.rows_each)]
                      : 0.0f;
    }
  }

  __device__ __forceinline__ void Store(const GroupItem& item, int tile, const std::int32_t* state_rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * kTileRows + State::Row(lane_, half);
      if (row < item.rows) span_.StorePrefix(p_, half, state_rows[row], item.span);
    }
  }

  State states_[kTiles];
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_GROUPED_CUH_
