// The part of the decode kernels (decode.cuh, decode_quantized.cuh) that does not depend on the storage type: a block's
// loop over its part of the work list, the ring of stages in shared memory, softmax, and the states of spans and units.
//
// The rows of a unit (query tokens times heads of the group) form one tile of 16. Keys and values stream through a ring
// of stages in shared memory. The next tile is requested before the current one is used, across units and sequences, so
// that memory is never idle. Scores: every warp computes a quarter of the tile's tokens. Values: every warp computes a
// quarter of the columns over all tokens; the warps exchange the weights through shared memory.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_LOOP_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_LOOP_CUH_

#include <cstdint>

#include "kernels/cuda/decode_state.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/merge_prefix.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// A block's shared memory: weights and exchange buffers, then the stages. A stage holds the keys and values of a tile,
// the queries of a unit and, for one-byte elements, the scales of keys and values. With one-byte elements, the weights
// replace the keys, which are no longer needed by then: three stages fit into half of a multiprocessor's memory.
template <int kDim, int kTileTokens, int kElementBytes>
struct DecodeLayout {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kMaxStages = 8;
  static constexpr bool kScales = kElementBytes == 1;
  static constexpr int kTileBytes = kTokens * kDim * kElementBytes;
  static constexpr int kQueryBytes = kTileRows * kDim * 2;
  static constexpr int kScaleBytes = kScales ? kTokens * 4 : 0;  // of the keys, or of the values
  static constexpr int kStageBytes = 2 * kTileBytes + kQueryBytes + 2 * kScaleBytes;
  static constexpr int kWeightBytes = kScales ? 0 : kTileRows * kTokens * 2;
  static constexpr int kExchangeBytes = kWarps * kTileRows * 4;
  static constexpr int kFixedBytes = kWeightBytes + (kScales ? 3 : 2) * kExchangeBytes;
};

// Kernel is the derived class. It must have FetchTokens(unit, begin, stage), which starts copying a tile;
// ArrangeQueries(), which may permute the columns of a new unit's queries; Tile(begin, stage), which adds a tile to the
// span's state; and EndSpan(unit, span), which calls EndSpanState. T is the type of queries and products; for
// kInterleaved see DecodeState.
template <class Kernel, class T, int kDim, class Layout, bool kInterleaved>
class DecodeLoop {
 public:
  __device__ __forceinline__ void Run() {
    SplitPoint from, to;
    if (!FindPiece(p_, &from, &to)) return;
    Walker walker, ahead;
    walker.Start(p_, from, to, kTokens);
    if (walker.done) return;
    ahead = walker;
    for (int stage = 0; stage < p_.stages - 1; ++stage) Fetch(ahead, stage, from, to);
    if constexpr (kGroups) {
      if (p_.checked->groups_hold != 0) MergePrefixes<kDim>(p_, walker, from, to, kTokens);
    }
    for (int stage = 0; !walker.done;) {
      WaitForStage(p_.stages);
      __syncthreads();
      Fetch(ahead, stage == 0 ? p_.stages - 1 : stage - 1, from, to);
      if (walker.FirstTile()) BeginUnit(walker);
      kernel().Tile(walker.token, stage);
      const std::int32_t next = walker.token + kTokens;
      const bool last = next >= walker.ItemEnd();
      if (last || (next & ((1 << walker.unit.shift) - 1)) == 0) {
        kernel().EndSpan(walker.unit, (next - 1) >> walker.unit.shift);
      }
      if (last) {
        EndUnit(walker.unit);
        used_ = Next(used_);
      }
      walker.Next(p_, from, to, kTokens);
      stage = Next(stage);
    }
    WaitForCopies<0>();
  }

 protected:
  static constexpr bool kGroups = !kInterleaved;  // not for quantized storage (CanGroup)
  using Walker = WorkIterator<kGroups>;
  using State = DecodeState<kDim, kInterleaved>;
  using Rows = TileRows<kDim>;  // 16-bit elements
  using WeightRows = TileRows<Layout::kTokens>;
  static constexpr int kSteps = kDim / 16;           // per dot product
  static constexpr bool kHoldQueries = kDim <= 128;  // a unit's queries fit in registers
  static constexpr int kTokens = Layout::kTokens;
  static constexpr int kScoreTiles = kTokens / 8 / kWarps;  // tiles of 8 tokens per warp

  __device__ __forceinline__ unsigned char* Keys(int stage) const { return stages_ + stage * Layout::kStageBytes; }
  __device__ __forceinline__ unsigned char* Values(int stage) const { return Keys(stage) + Layout::kTileBytes; }
  // A second ring, indexed by unit: a block is never further ahead in units than in tiles.
  __device__ __forceinline__ unsigned char* Queries(int slot) const { return Keys(slot) + 2 * Layout::kTileBytes; }
  // The queries of the current unit.
  __device__ __forceinline__ unsigned char* Queries() const { return Queries(used_); }
  // 16 columns of the queries as the left operand of a product; `loaded` is a buffer for them.
  __device__ __forceinline__ const std::uint32_t (&Query(int k, std::uint32_t (&loaded)[4]) const)[4] {
    if constexpr (kHoldQueries) return queries_[k];
    LoadQueries(loaded, k);
    return loaded;
  }

  __device__ __forceinline__ void LoadQueries(std::uint32_t (&a)[4], int k) const {
    LoadMatrices(a, Queries() + Rows::Offset(lane_ % 16, 2 * k + lane_ / 16));
  }

  __device__ __forceinline__ int Next(int slot) const { return slot + 1 == p_.stages ? 0 : slot + 1; }

  // The token of element i (as in fragment C) of score tile n, in a tile that starts at `begin`.
  __device__ __forceinline__ std::int32_t Token(std::int32_t begin, int n, int i) const {
    return begin + (warp_ * kScoreTiles + n) * 8 + lane_ % 4 * 2 + i % 2;
  }
  __device__ __forceinline__ bool Sees(int half, std::int32_t token) const {
    return token >= first_[half] && token <= position_[half];
  }
  // Whether the rows see different tokens of the tile.
  __device__ __forceinline__ bool Masked(std::int32_t begin) const { return range_.Mixed(begin, kTokens); }
  // Maximum of x over the four threads of the warp that hold the same row.
  __device__ __forceinline__ static float RowMax(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
  }

  // Calls fn(n, i) for element i of each score tile n.
  template <class Fn>
  __device__ __forceinline__ static void ForScores(Fn&& fn) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fn(n, i);
    }
  }

  // Turns dot products into scores, -inf for tokens that the row does not see, and stores the warp's largest score in
  // tops_.
  __device__ __forceinline__ void Score(std::int32_t begin, bool masked, float (&scores)[kScoreTiles][4]) const {
    // One branch for all elements, instead of one per element.
    if (!rule_.plain) {
      ForScores([&](int n, int i) {
        scores[n][i] = rule_.Score(scores[n][i], slope_[i / 2], Token(begin, n, i) - position_[i / 2]);
      });
    }
    if (masked) {
      ForScores([&](int n, int i) {
        if (!Sees(i / 2, Token(begin, n, i))) scores[n][i] = NegativeInfinity();
      });
    }
    float top[2] = {NegativeInfinity(), NegativeInfinity()};
    ForScores([&](int n, int i) { top[i / 2] = fmaxf(top[i / 2], scores[n][i]); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = RowMax(top[half]);
      if (lane_ % 4 == 0) tops_[warp_ * kTileRows + State::Row(lane_, half)] = top[half];
    }
  }

  // Maximum over what the warps stored for the thread's row.
  __device__ __forceinline__ float AllWarps(const float* exchange, int half, float largest) const {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, exchange[w * kTileRows + State::Row(lane_, half)]);
    return largest;
  }

  // Updates the span's maximum with the tile's largest scores. Returns what to subtract from scores, and the factor for
  // all weights so far.
  __device__ __forceinline__ void RaiseMax(float (&base)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = AllWarps(tops_, half, span_.max[half]);
      base[half] = Base(all);
      factor[half] = Weight(span_.max[half], base[half], rule_.unit);
      span_.max[half] = all;
      span_.sum[half] *= factor[half];
    }
  }

  __device__ __forceinline__ void ScaleValues(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < State::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) span_.values[n][i] *= factor[i / 2];
    }
  }

  // Stores the weights of two tokens for the other warps.
  __device__ __forceinline__ void StoreWeights(unsigned char* weights, int n, int half, float a, float b) const {
    unsigned char* to = weights + WeightRows::Offset(State::Row(lane_, half), warp_ * kScoreTiles + n) + lane_ % 4 * 4;
    *reinterpret_cast<std::uint32_t*>(to) = Pack<T>(a, b);
  }
  // Loads the tile's weights of 16 tokens as the left operand of a product.
  __device__ __forceinline__ void LoadWeights(std::uint32_t (&a)[4], const unsigned char* weights, int k) const {
    LoadMatrices(a, weights + WeightRows::Offset(lane_ % 16, 2 * k + lane_ / 16));
  }

  // Reduces the span's sum over all threads of the row.
  __device__ __forceinline__ void AddSums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      span_.sum[half] += __shfl_xor_sync(kFullMask, span_.sum[half], 1);
      span_.sum[half] += __shfl_xor_sync(kFullMask, span_.sum[half], 2);
      if (lane_ % 4 == 0) sums_[warp_ * kTileRows + State::Row(lane_, half)] = span_.sum[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums_[w * kTileRows + State::Row(lane_, half)];
      span_.sum[half] = sum;
    }
  }

  // Merges the span into the unit's state, or stores it for the block that reduces the unit.
  __device__ __forceinline__ void EndSpanState(const WorkUnit& unit, std::int32_t span) {
    AddSums();
    if (unit.split_index < 0 || IsFirstItem(unit)) {
      unit_.Merge(span_, rule_.unit);
    } else {
      span_.Store(p_, unit, span - unit.first_span);
    }
    span_.Reset();
  }

  const AttentionParams& p_;
  const ScoreRule<false> rule_;
  const TokenMap map_;
  unsigned char* const weights_;  // [kTileRows, kTokens] for the current tile
  float* const tops_;             // [kWarps, kTileRows] largest score per warp
  float* const sums_;
  unsigned char* const stages_;
  const int lane_, warp_;
  State span_, unit_;  // of the current span (`sum` is per thread until the span ends), of the spans before it
  bool mixed_;         // rows see different tokens
  std::uint32_t queries_[kHoldQueries ? kSteps : 1][4];
  int fetched_ = 0, used_ = 0;  // query slots: for the next unit's queries, and of the current unit
  float slope_[2];
  std::int32_t position_[2], first_[2];
  VisibleRange range_;

 private:
  friend Kernel;

  __device__ __forceinline__ DecodeLoop(const AttentionParams& params, unsigned char* shared)
      : p_(params),
        rule_(params),
        map_(params.checked->view),
        weights_(shared),
        tops_(reinterpret_cast<float*>(shared + Layout::kWeightBytes)),
        sums_(tops_ + kWarps * kTileRows),
        stages_(shared + Layout::kFixedBytes),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {}

  __device__ __forceinline__ Kernel& kernel() { return static_cast<Kernel&>(*this); }

  __device__ __forceinline__ void Fetch(Walker& ahead, int stage, const SplitPoint& from, const SplitPoint& to) {
    if (!ahead.done) {
      const WorkUnit& unit = ahead.unit;
      kernel().FetchTokens(unit, ahead.token, stage);
      if (ahead.FirstTile()) {
        FetchQueries<kDim, kTileRows>(p_, unit.sequence, unit.head, unit.first_row, unit.rows, Queries(fetched_));
        fetched_ = Next(fetched_);
      }
      ahead.Next(p_, from, to, kTokens);
    }
    CommitCopies();
  }

  __device__ __forceinline__ void BeginUnit(const Walker& walker) {
    const WorkUnit& unit = walker.unit;
    kernel().ArrangeQueries();
    if constexpr (kHoldQueries) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) LoadQueries(queries_[k], k);
    }
    const std::int32_t window = p_.checked->sliding_window;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(State::Row(lane_, half), unit.rows - 1);
      position_[half] = RowPosition(p_, unit, row);
      first_[half] = FirstVisible(position_[half], window);
      slope_[half] = rule_.alibi ? p_.options.alibi_slopes[RowHead(p_, unit, row)] : 0.0f;
    }
    span_.Reset();
    unit_.Reset();
    if constexpr (kGroups) {
      if (HasPrefix(unit)) unit_.LoadPrefix(p_, PrefixRow(p_, walker), unit.rows);
    }
    const std::int32_t first = RowPosition(p_, unit, 0), last = RowPosition(p_, unit, unit.rows - 1);
    range_ = VisibleRange::Of(first, last, window);
    mixed_ = first != last;
  }

  __device__ __forceinline__ void EndUnit(const WorkUnit& unit) const {
    if (unit.split_index >= 0) {
      if (IsFirstItem(unit)) unit_.Store(p_, unit, 0);
      EndItem(p_, unit);
    } else {
      unit_.template Write<T>(p_, unit);
    }
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_LOOP_CUH_
