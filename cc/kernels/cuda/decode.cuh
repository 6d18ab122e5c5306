// Attention of few rows on tensor cores: the decode path, bound by the bandwidth of memory.
//
// The rows of a unit (query tokens times heads of the group) are one tile of 16. Keys and values stream through a ring
// of stages in shared memory; the next tile is requested before this one is used, across units and sequences, so that
// memory always has something to do. Scores: every warp takes a quarter of the tile's tokens. Values: every warp takes
// a quarter of the columns and all tokens, whose weights the warps exchange through shared memory.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_CUH_

#include <cstdint>

#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

template <int kDim>
struct DecodeShape {
  static constexpr int kTokens = kDim > 128 ? 32 : 64;  // of a tile
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
  using Rows = TileRows<kDim>;
  using WeightRows = TileRows<Shape::kTokens>;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSteps = kDim / 16;                  // of a dot product
  static constexpr int kScoreTiles = kTokens / 8 / kWarps;  // of 8 tokens, a warp's
  static constexpr int kValueTiles = kDim / 8 / kWarps;     // of 8 columns, a warp's
  static constexpr bool kHoldQueries = kScoreTiles == 2;    // in registers, all of a unit

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
    const Cut from = p_.plan.cuts[blockIdx.x], to = p_.plan.cuts[blockIdx.x + 1];
    Walker walker, ahead;
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
      const bool last = next >= walker.PieceEnd();
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
  // A ring of its own, by unit: a block is never further ahead in units than in tiles.
  __device__ __forceinline__ unsigned char* Queries(int slot) const { return Keys(slot) + 2 * Shape::kTileBytes; }

  __device__ __forceinline__ void Fetch(Walker& ahead, int stage, const Cut& from, const Cut& to) {
    if (!ahead.done) {
      const Unit& unit = ahead.unit;
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

  // Row of the tile that this thread holds in the lower (0) or upper (1) half of a fragment.
  __device__ __forceinline__ int Row(int half) const { return lane_ / 4 + 8 * half; }

  // 16 columns of the queries as the left side of a product.
  __device__ __forceinline__ void LoadQueries(std::uint32_t (&a)[4], int k) const {
    LoadMatrices(a, Queries(used_) + Rows::Offset(lane_ % 16, 2 * k + lane_ / 16));
  }

  __device__ __forceinline__ void BeginUnit(const Unit& unit) {
    if constexpr (kHoldQueries) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) LoadQueries(queries_[k], k);
    }
    const std::int32_t window = p_.checked->sliding_window;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(Row(half), unit.rows - 1);
      position_[half] = RowPosition(p_, unit, row);
      first_[half] = FirstVisible(position_[half], window);
      slope_[half] = rule_.alibi ? p_.options.alibi_slopes[RowHead(p_, unit, row)] * kLog2E : 0.0f;
      max_[half] = unit_max_[half] = NegativeInfinity();
      sum_[half] = unit_sum_[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values_[n][i] = unit_values_[n][i] = 0.0f;
    }
    // What every row sees.
    const std::int32_t first = unit.sequence.position + unit.first_row / p_.group;
    const std::int32_t last = unit.sequence.position + (unit.first_row + unit.rows - 1) / p_.group;
    all_begin_ = FirstVisible(last, window);
    all_end_ = first + 1;
    mixed_ = first != last;
  }

  __device__ __forceinline__ void Tile(std::int32_t begin, int stage) {
    const int first = warp_ * 8 * kScoreTiles;
    float scores[kScoreTiles][4] = {};
    Dots(Keys(stage), first, scores);

    const bool masked = begin < all_begin_ || begin + kTokens > all_end_;
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
      if (lane_ % 4 == 0) tops_[warp_ * kTileRows + Row(half)] = top[half];
    }
    __syncthreads();

    float base[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = max_[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all = fmaxf(all, tops_[w * kTileRows + Row(half)]);
      base[half] = Base(all);
      factor[half] = Exp2(max_[half] - base[half]);
      max_[half] = all;
      sum_[half] *= factor[half];
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = Exp2(scores[n][2 * half] - base[half]), b = Exp2(scores[n][2 * half + 1] - base[half]);
        sum_[half] += a + b;
        unsigned char* to = weights_ + WeightRows::Offset(Row(half), warp_ * kScoreTiles + n) + lane_ % 4 * 4;
        *reinterpret_cast<std::uint32_t*>(to) = Pack<T>(a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values_[n][i] *= factor[i / 2];
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
      // Two sums, so that one product need not wait for the one before.
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
        MultiplyAdd<T>(values_[n], a, b[0], b[1]);
        MultiplyAdd<T>(values_[n + 1], a, b[2], b[3]);
      }
    }
  }

  // The same where some values are not finite: see tiles.cuh.
  __device__ __forceinline__ void AddGuardedValues(const unsigned char* values) {
#pragma unroll
    for (int n = 0; n < kValueTiles; n += 2) {
      float plus[2][4] = {}, minus[2][4] = {};
      for (int k = 0; k < kTokens / 16; ++k) {
        std::uint32_t a[4], b[4];
        LoadWeights(a, k);
        LoadValues(b, values, k, n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          MultiplyAdd<T>(values_[n + i], a, KeepFinite<T>(b[2 * i]), KeepFinite<T>(b[2 * i + 1]));
          MultiplyAdd<T>(plus[i], a, Marks<T, false>(b[2 * i]), Marks<T, false>(b[2 * i + 1]));
          MultiplyAdd<T>(minus[i], a, Marks<T, true>(b[2 * i]), Marks<T, true>(b[2 * i + 1]));
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (plus[i / 4][i % 4] > 0.0f) values_[n + i / 4][i % 4] -= NegativeInfinity();
        if (minus[i / 4][i % 4] > 0.0f) values_[n + i / 4][i % 4] += NegativeInfinity();
      }
    }
  }

  // Takes the span into the unit's state, or leaves it in memory for the block that folds the unit.
  __device__ __forceinline__ void EndSpan(const Unit& unit, std::int32_t span) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum_[half] += __shfl_xor_sync(kFullMask, sum_[half], 1);
      sum_[half] += __shfl_xor_sync(kFullMask, sum_[half], 2);
      if (lane_ % 4 == 0) sums_[warp_ * kTileRows + Row(half)] = sum_[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums_[w * kTileRows + Row(half)];
      sum_[half] = sum;
    }
    if (unit.shared_index < 0 || IsFirstPiece(unit)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Fold fold(unit_max_[half], unit_sum_[half], max_[half], sum_[half]);
        unit_max_[half] = fold.max;
        unit_sum_[half] = fold.sum;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) unit_values_[n][i] = fold(unit_values_[n][i], values_[n][i]);
        }
      }
    } else {
      StoreState(unit, span - unit.first_span, values_, max_, sum_);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_[half] = NegativeInfinity();
      sum_[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values_[n][i] = 0.0f;
    }
  }

  __device__ __forceinline__ int Column(int n) const { return (warp_ * kValueTiles + n) * 8 + lane_ % 4 * 2; }

  __device__ __forceinline__ void StoreState(const Unit& unit, std::int32_t slot, const float (&values)[kValueTiles][4],
                                             const float (&max)[2], const float (&sum)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (Row(half) >= unit.rows) continue;
      const std::int64_t state = StateIndex(p_, unit, Row(half), slot);
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
        *reinterpret_cast<float2*>(p_.plan.values + state * kDim + Column(n)) =
            make_float2(values[n][2 * half], values[n][2 * half + 1]);
      }
      if (warp_ == 0 && lane_ % 4 == 0) p_.plan.sums[state] = make_float2(max[half], sum[half]);
    }
  }

  __device__ __forceinline__ void EndUnit(const Unit& unit) const {
    if (unit.shared_index >= 0) {
      if (IsFirstPiece(unit)) StoreState(unit, 0, unit_values_, unit_max_, unit_sum_);
      EndPiece(p_, unit);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (Row(half) >= unit.rows) continue;
      const Finish finish(p_, RowHead(p_, unit, Row(half)), unit_max_[half], unit_sum_[half]);
      const std::int64_t index = RowIndex(p_, unit, Row(half));
      T* out = static_cast<T*>(p_.out) + index * kDim;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
        *reinterpret_cast<std::uint32_t*>(out + Column(n)) =
            Pack<T>(unit_values_[n][2 * half] * finish.factor, unit_values_[n][2 * half + 1] * finish.factor);
      }
      if (warp_ == 0 && lane_ % 4 == 0 && p_.lse != nullptr) p_.lse[index] = finish.lse;
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
  float values_[kValueTiles][4], unit_values_[kValueTiles][4];  // the span's, and those of the spans before
  float max_[2], sum_[2], unit_max_[2], unit_sum_[2];           // sum_: this thread's part, until the span ends
  float slope_[2];
  std::int32_t position_[2], first_[2];
  std::int32_t all_begin_, all_end_;
  bool mixed_;  // rows see different tokens
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_CUH_
