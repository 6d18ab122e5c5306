// The decode kernel: attention of up to 16 rows per sequence and KV head on tensor cores, bound by memory bandwidth.
//
// The rows of a unit (query tokens times heads of the group) are one tile of 16. Keys and values stream through a ring
// of stages in shared memory; the next tile is requested before this one is used, across units and sequences, so that
// memory is never idle. Scores: every warp computes a quarter of the tile's tokens. Values: every warp computes a
// quarter of the columns over all tokens; the warps exchange the weights through shared memory.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_CUH_

#include <cstdint>

#include "kernels/cuda/decode_state.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/nonfinite.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

template <int kDim>
struct DecodeShape {
  static constexpr int kTokens = kDim > 128 ? 32 : 64;  // of a tile
  static constexpr int kMaxStages = 8;
  static constexpr int kTileBytes = kTokens * kDim * 2;
  static constexpr int kQueryBytes = kTileRows * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes + kQueryBytes;  // keys and values of a tile, queries of a unit
  static constexpr int kWeightBytes = kTileRows * kTokens * 2;
  static constexpr int kExchangeBytes = kWarps * kTileRows * 4;
  static constexpr int kFixedBytes = kWeightBytes + 2 * kExchangeBytes;
};

template <class T, int kDim>
class DecodeAttention {
  using Shape = DecodeShape<kDim>;
  using State = DecodeState<kDim>;
  using Rows = TileRows<kDim>;
  using WeightRows = TileRows<Shape::kTokens>;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSteps = kDim / 16;                  // of a dot product
  static constexpr int kScoreTiles = kTokens / 8 / kWarps;  // of 8 tokens, a warp's
  static constexpr int kValueTiles = State::kTiles;
  static constexpr bool kHoldQueries = kScoreTiles == 2;  // a unit's queries fit in registers

 public:
  __device__ __forceinline__ DecodeAttention(const AttentionParams& params, unsigned char* shared)
      : p_(params),
        rule_(params),
        map_(params.checked->view),
        weights_(shared),
        tops_(reinterpret_cast<float*>(shared + Shape::kWeightBytes)),
        sums_(tops_ + kWarps * kTileRows),
        stages_(shared + Shape::kFixedBytes),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {}

  __device__ __forceinline__ void Run() {
    SplitPoint from, to;
    if (!FindPiece(p_, &from, &to)) return;
    WorkIterator walker, ahead;
    walker.Start(p_, from, to, kTokens);
    if (walker.done) return;
    ahead = walker;
    for (int stage = 0; stage < p_.stages - 1; ++stage) Fetch(ahead, stage, from, to);
    for (int stage = 0; !walker.done;) {
      WaitForStage(p_.stages);
      __syncthreads();
      Fetch(ahead, stage == 0 ? p_.stages - 1 : stage - 1, from, to);
      if (walker.FirstTile()) BeginUnit(walker.unit);
      Tile(walker.token, stage);
      const std::int32_t next = walker.token + kTokens;
      const bool last = next >= walker.ItemEnd();
      if (last || (next & ((1 << walker.unit.shift) - 1)) == 0) EndSpan(walker.unit, (next - 1) >> walker.unit.shift);
      if (last) {
        EndUnit(walker.unit);
        used_ = Next(used_);
      }
      walker.Next(p_, from, to, kTokens);
      stage = Next(stage);
    }
    WaitForCopies<0>();
  }

 private:
  __device__ __forceinline__ unsigned char* Keys(int stage) const { return stages_ + stage * Shape::kStageBytes; }
  __device__ __forceinline__ unsigned char* Values(int stage) const { return Keys(stage) + Shape::kTileBytes; }
  // A second ring, by unit: a block is never further ahead in units than in tiles.
  __device__ __forceinline__ unsigned char* Queries(int slot) const { return Keys(slot) + 2 * Shape::kTileBytes; }

  __device__ __forceinline__ void Fetch(WorkIterator& ahead, int stage, const SplitPoint& from, const SplitPoint& to) {
    if (!ahead.done) {
      const WorkUnit& unit = ahead.unit;
      const Tokens tokens(p_.checked->view, unit.sequence.slot, p_.checked->layer, unit.head);
      FetchTile<kDim, kTokens>(map_, tokens, ahead.token, unit.begin, unit.end, Keys(stage), Values(stage));
      if (ahead.FirstTile()) {
        FetchQueries<kDim, kTileRows>(p_, unit.sequence, unit.head, unit.first_row, unit.rows, Queries(fetched_));
        fetched_ = Next(fetched_);
      }
      ahead.Next(p_, from, to, kTokens);
    }
    CommitCopies();
  }

  __device__ __forceinline__ int Next(int slot) const { return slot + 1 == p_.stages ? 0 : slot + 1; }

  // 16 columns of the queries as the left side of a product.
  __device__ __forceinline__ void LoadQueries(std::uint32_t (&a)[4], int k) const {
    LoadMatrices(a, Queries(used_) + Rows::Offset(lane_ % 16, 2 * k + lane_ / 16));
  }

  __device__ __forceinline__ void BeginUnit(const WorkUnit& unit) {
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
    const std::int32_t first = RowPosition(p_, unit, 0), last = RowPosition(p_, unit, unit.rows - 1);
    range_ = VisibleRange::Of(first, last, window);
    mixed_ = first != last;
  }

  __device__ __forceinline__ void Tile(std::int32_t begin, int stage) {
    const int first = warp_ * 8 * kScoreTiles;
    float scores[kScoreTiles][4] = {};
    Dots(Keys(stage), first, scores);

    const bool masked = range_.Mixed(begin, kTokens);
    float top[2] = {NegativeInfinity(), NegativeInfinity()};
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const std::int32_t token = begin + first + 8 * n + lane_ % 4 * 2 + i % 2;
        float score = rule_.Score(scores[n][i], slope_[half], token - position_[half]);
        if (masked && (token < first_[half] || token > position_[half])) score = NegativeInfinity();
        scores[n][i] = score;
        top[half] = fmaxf(top[half], score);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(kFullMask, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(kFullMask, top[half], 2));
      if (lane_ % 4 == 0) tops_[warp_ * kTileRows + State::Row(lane_, half)] = top[half];
    }
    __syncthreads();

    float base[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = span_.max[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all = fmaxf(all, tops_[w * kTileRows + State::Row(lane_, half)]);
      base[half] = Base(all);
      factor[half] = Weight(span_.max[half], base[half], rule_.unit);
      span_.max[half] = all;
      span_.sum[half] *= factor[half];
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = Weight(scores[n][2 * half], base[half], rule_.unit);
        const float b = Weight(scores[n][2 * half + 1], base[half], rule_.unit);
        span_.sum[half] += a + b;
        unsigned char* to =
            weights_ + WeightRows::Offset(State::Row(lane_, half), warp_ * kScoreTiles + n) + lane_ % 4 * 4;
        *reinterpret_cast<std::uint32_t*>(to) = Pack<T>(a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) span_.values[n][i] *= factor[i / 2];
    }
    __syncthreads();
    if (mixed_ && masked && AnyNonFinite<T, kDim, kTokens>(Values(stage))) {
      AddGuardedValues(Values(stage));
    } else {
      AddValues(Values(stage));
    }
  }

  // Dot products of the rows with the warp's tokens of the tile, from `first` on.
  __device__ __forceinline__ void Dots(const unsigned char* keys, int first, float (&scores)[kScoreTiles][4]) const {
    if constexpr (kScoreTiles == 2) {
      const int row = first + lane_ % 8 + lane_ / 16 * 8;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        std::uint32_t b[4];
        LoadMatrices(b, keys + Rows::Offset(row, 2 * k + lane_ / 8 % 2));
        MultiplyAdd<T>(scores[0], queries_[k], b[0], b[1]);
        MultiplyAdd<T>(scores[1], queries_[k], b[2], b[3]);
      }
    } else {
      static_assert(kScoreTiles == 1);
      const int row = first + lane_ % 8;
      // Two accumulators, so that consecutive products are independent.
      float other[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; k += 2) {
        std::uint32_t b[4];
        LoadMatrices(b, keys + Rows::Offset(row, 2 * k + lane_ / 8));
        std::uint32_t a[2][4];
        LoadQueries(a[0], k);
        LoadQueries(a[1], k + 1);
        MultiplyAdd<T>(scores[0], a[0], b[0], b[1]);
        MultiplyAdd<T>(other, a[1], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][i] += other[i];
    }
  }

  // The tile's weights of 16 tokens as the left side of a product.
  __device__ __forceinline__ void LoadWeights(std::uint32_t (&a)[4], int k) const {
    LoadMatrices(a, weights_ + WeightRows::Offset(lane_ % 16, 2 * k + lane_ / 16));
  }
  // Values of 16 tokens, the warp's columns 8 n to 8 n + 15, as the right side of two.
  __device__ __forceinline__ void LoadValues(std::uint32_t (&b)[4], const unsigned char* values, int k, int n) const {
    LoadMatricesTransposed(b, values + Rows::Offset(16 * k + lane_ % 16, warp_ * kValueTiles + n + lane_ / 16));
  }

  __device__ __forceinline__ void AddValues(const unsigned char* values) {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      std::uint32_t a[4];
      LoadWeights(a, k);
#pragma unroll
      for (int n = 0; n < kValueTiles; n += 2) {
        std::uint32_t b[4];
        LoadValues(b, values, k, n);
        MultiplyAdd<T>(span_.values[n], a, b[0], b[1]);
        MultiplyAdd<T>(span_.values[n + 1], a, b[2], b[3]);
      }
    }
  }

  // The same where some values are not finite (nonfinite.cuh).
  __device__ __forceinline__ void AddGuardedValues(const unsigned char* values) {
#pragma unroll
    for (int n = 0; n < kValueTiles; n += 2) {
      MarkSums marks;
      for (int k = 0; k < kTokens / 16; ++k) {
        std::uint32_t a[4], b[4];
        LoadWeights(a, k);
        LoadValues(b, values, k, n);
        AddGuarded<T>(&span_.values[n], marks, a, b);
      }
      AddInfinities(&span_.values[n], marks);
    }
  }

  // Merges the span into the unit's state, or stores it for the block that reduces the unit.
  __device__ __forceinline__ void EndSpan(const WorkUnit& unit, std::int32_t span) {
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
    if (unit.split_index < 0 || IsFirstItem(unit)) {
      unit_.Merge(span_, rule_.unit);
    } else {
      span_.Store(p_, unit, span - unit.first_span);
    }
    span_.Reset();
  }

  __device__ __forceinline__ void EndUnit(const WorkUnit& unit) const {
    if (unit.split_index >= 0) {
      if (IsFirstItem(unit)) unit_.Store(p_, unit, 0);
      EndItem(p_, unit);
    } else {
      unit_.template Write<T>(p_, unit);
    }
  }

  const AttentionParams& p_;
  const ScoreRule<false> rule_;
  const TokenMap map_;
  unsigned char* const weights_;  // [kTileRows, kTokens] of the tile
  float* const tops_;             // [kWarps, kTileRows] each warp's largest score
  float* const sums_;
  unsigned char* const stages_;
  const int lane_, warp_;

  int fetched_ = 0, used_ = 0;  // queries: where the next ones go, where the unit's are
  std::uint32_t queries_[kHoldQueries ? kSteps : 1][4];
  State span_, unit_;  // of the span, whose sum is this thread's part until the span ends; of the spans before
  float slope_[2];
  std::int32_t position_[2], first_[2];
  VisibleRange range_;
  bool mixed_;  // rows see different tokens
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_CUH_
