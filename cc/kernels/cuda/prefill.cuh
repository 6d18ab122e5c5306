// The prefill kernel: attention on tensor cores for prompts, chunks of prompts, and the sequences of a mixed batch that
// have more rows than one tile of decode.
//
// A tile of 64 or 128 rows (query tokens times heads of the group) stays in shared memory while keys and values stream
// past it. Every warp computes its own rows over all tokens, so weights pass from one product to the next in registers.
// Blocks take work items from a queue; within a sequence, those with the longest contexts come first. Tiles of tokens
// that no row of a warp sees are skipped.
#ifndef KVPAGE_KERNELS_CUDA_PREFILL_CUH_
#define KVPAGE_KERNELS_CUDA_PREFILL_CUH_

#include <cstdint>

#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/nonfinite.cuh"
#include "kernels/cuda/prefill_queue.cuh"
#include "kernels/cuda/prefill_state.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

template <int kDim>
struct PrefillShape {
  static constexpr int kRows = PrefillRows(kDim);
  static constexpr int kTokens = kDim > 128 ? 32 : 64;  // per tile in shared memory
  static constexpr int kStep = 32;                      // tokens whose scores are in registers at a time
  static constexpr int kMaxStages = 4;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kTileBytes = kTokens * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;     // keys and values
  static constexpr int kFixedBytes = kQueryBytes + 128;  // queries and the ranges of positions
};

template <class T, int kDim>
class PrefillAttention {
  using Shape = PrefillShape<kDim>;
  using State = PrefillState<kDim>;
  using Rows = TileRows<kDim>;
  static constexpr int kTokens = Shape::kTokens, kStep = Shape::kStep;
  static constexpr int kBlocks = State::kBlocks, kColumns = State::kColumns;
  static constexpr int kScoreTiles = kStep / 8;
  static constexpr float kFusedScores = 512.0f;  // rounded by no more than 2^-15

 public:
  __device__ __forceinline__ PrefillAttention(const AttentionParams& params, unsigned char* shared)
      : p_(params),
        plain_(OnlyScales(params)),
        unit_(ScoreUnit(params)),
        map_(params.checked->view),
        queries_(shared),
        ranges_(reinterpret_cast<VisibleRange*>(shared + Shape::kQueryBytes)),
        stages_(shared + Shape::kFixedBytes),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {}

  __device__ __forceinline__ void Run() {
    // In shared memory, because registers limit this kernel.
    KVPAGE_SHARED(PrefillItem, work);
    const PrefillQueue items(p_);
    while (items.Take(p_, &work)) {
      if (work.from < work.to) {
        Attend(work);
      } else if (Arrive(&p_.state.arrived[work.unit], work.items)) {
        Merge(work);
      }
    }
  }

 private:
  __device__ __forceinline__ unsigned char* Keys(int stage) const { return stages_ + stage * Shape::kStageBytes; }
  __device__ __forceinline__ unsigned char* Values(int stage) const { return Keys(stage) + Shape::kTileBytes; }
  __device__ __forceinline__ int Row(int block, int half) const { return State::Row(lane_, warp_, block, half); }

  __device__ __forceinline__ void Attend(const PrefillItem& work) {
    const Tokens tokens(p_.checked->view, work.sequence.slot, p_.checked->layer, work.head);
    const std::int32_t begin = work.from / kTokens * kTokens;
    std::int32_t ahead = begin;
    const auto fetch = [&](int stage) {
      if (ahead < work.to) {
        FetchTile<kDim, kTokens>(map_, tokens, ahead, work.from, work.to, Keys(stage), Values(stage));
        ahead += kTokens;
      }
      CommitCopies();
    };
    FetchQueries<kDim, Shape::kRows>(p_, work.sequence, work.head, work.first_row, work.rows, queries_);
    for (int stage = 0; stage < p_.stages - 1; ++stage) fetch(stage);
    BeginItem(work);
    int stage = 0;
    for (std::int32_t token = begin; token < work.to; token += kTokens) {
      WaitForStage(p_.stages);
      __syncthreads();
      fetch(stage == 0 ? p_.stages - 1 : stage - 1);
      const bool guarded = ranges_[kWarps].Mixed(token, kTokens) && AnyNonFinite<T, kDim, kTokens>(Values(stage));
#pragma unroll 1
      for (int step = 0; step < kTokens; step += kStep) {
        if (token + step >= ranges_[warp_].end || token + step + kStep <= ranges_[warp_].begin) continue;
        Tile(work, token + step, step, stage, guarded);
      }
      const std::int32_t next = token + kTokens;
      if (next < work.to && (next & ((std::int64_t{1} << work.shift) - 1)) == 0) KeepSpan();
      if (++stage == p_.stages) stage = 0;
    }
    WaitForCopies<0>();
    state_.SumRows();
    if (work.split) {
      state_.Store(Memory(work.state));
      if (Arrive(&p_.state.arrived[work.unit], work.items)) Merge(work);
    } else {
      if (kept_) state_.template Merge</*kMemoryFirst=*/true>(Memory(blockIdx.x), unit_);
      state_.template Write<T>(p_, work);
    }
  }

  __device__ __forceinline__ void BeginItem(const PrefillItem& work) {
    const std::int32_t window = p_.checked->sliding_window;
    const auto position = [&](std::int32_t row) {
      return RowPosition(p_, work.sequence, work.first_row + min(row, work.rows - 1));
    };
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) position_[m][half] = position(Row(m, half));
    }
    __syncthreads();
    if (threadIdx.x < kWarps + 1) {
      // Ranges of each warp's rows, and of all rows.
      const int rows = kBlocks * 16, all = kWarps * rows, warp = static_cast<int>(threadIdx.x);
      const std::int32_t first = position(warp == kWarps ? 0 : warp * rows);
      const std::int32_t last = position(warp == kWarps ? all - 1 : warp * rows + rows - 1);
      ranges_[warp] = VisibleRange::Of(first, last, window);
    }
    __syncthreads();
    kept_ = false;
    state_.Reset();
  }

  // Processes kStep tokens from position `begin` on, which start at row `row` of the tile in shared memory.
  __device__ __forceinline__ void Tile(const PrefillItem& work, std::int32_t begin, int row, int stage, bool guarded) {
    float scores[kBlocks][kScoreTiles][4] = {};
    Dots(Keys(stage), row, scores);
    std::uint32_t weights[kBlocks][kScoreTiles][2];
    const bool masked = ranges_[warp_].Mixed(begin, kStep);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) Softmax(work, begin, masked, m, scores[m], weights[m]);
    if (guarded) {
      AddGuardedValues(Values(stage), row, weights);
    } else {
      AddValues(Values(stage), row, weights);
    }
  }

  __device__ __forceinline__ void Dots(const unsigned char* keys, int first,
                                       float (&scores)[kBlocks][kScoreTiles][4]) const {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      std::uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        LoadMatrices(a[m], queries_ + Rows::Offset((warp_ * kBlocks + m) * 16 + lane_ % 16, 2 * k + lane_ / 16));
      }
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        std::uint32_t b[4];
        LoadMatrices(b, keys + Rows::Offset(first + 8 * n + lane_ % 8 + lane_ / 16 * 8, 2 * k + lane_ / 8 % 2));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          MultiplyAdd<T>(scores[m][n], a[m], b[0], b[1]);
          MultiplyAdd<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void Softmax(const PrefillItem& work, std::int32_t begin, bool masked, int m,
                                          float (&scores)[kScoreTiles][4], std::uint32_t (&weights)[kScoreTiles][2]) {
    if (!plain_) {
      const ScoreRule<false> rule(p_);
      float slope[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!rule.alibi) break;
        slope[half] = p_.options.alibi_slopes[RowHead(p_, work.head, work.first_row + Row(m, half))];
      }
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int32_t token = begin + 8 * n + lane_ % 4 * 2 + i % 2;
          scores[n][i] = rule.Score(scores[n][i], slope[i / 2], token - position_[m][i / 2]);
        }
      }
    }
    if (masked) {
      const std::int32_t window = p_.checked->sliding_window;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int32_t token = begin + 8 * n + lane_ % 4 * 2 + i % 2, position = position_[m][i / 2];
          if (token > position || token < FirstVisible(position, window)) scores[n][i] = NegativeInfinity();
        }
      }
    }
    float base[2], factor[2], shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = NegativeInfinity();
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      top = fmaxf(top, state_.max[m][half]);
      base[half] = Base(top);
      shift[half] = __fmul_rn(base[half], unit_);
      factor[half] = Weight(state_.max[m][half], base[half], unit_);
      state_.max[m][half] = top;
      state_.sum[m][half] *= factor[half];
    }
    // For scores of ordinary size a fused product loses no precision and saves the subtraction. The choice is made per
    // row, so that a row's bits do not depend on other rows.
    if (!(fabsf(shift[0]) < kFusedScores && fabsf(shift[1]) < kFusedScores)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (fabsf(shift[half]) < kFusedScores) continue;
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
          scores[n][2 * half] = __fsub_rn(scores[n][2 * half], base[half]);
          scores[n][2 * half + 1] = __fsub_rn(scores[n][2 * half + 1], base[half]);
        }
        shift[half] = 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = Exp2(__fmaf_rn(scores[n][2 * half], unit_, -shift[half]));
        const float b = Exp2(__fmaf_rn(scores[n][2 * half + 1], unit_, -shift[half]));
        state_.sum[m][half] += a + b;
        weights[n][half] = Pack<T>(a, b);
      }
    }
    // The largest score rarely changes after the first tiles.
    if (__any_sync(kFullMask, factor[0] != 1.0f || factor[1] != 1.0f) == 0) return;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state_.values[m][n][i] *= factor[i / 2];
    }
  }

  // Weights of 16 tokens as the left operand of a product.
  __device__ static __forceinline__ void ToLeft(const std::uint32_t (&weights)[kScoreTiles][2], int k,
                                                std::uint32_t (&a)[4]) {
    a[0] = weights[2 * k][0];
    a[1] = weights[2 * k][1];
    a[2] = weights[2 * k + 1][0];
    a[3] = weights[2 * k + 1][1];
  }

  // Loads the values of 16 tokens, from row `row` of the tile on, columns 8 n to 8 n + 15, as the right operands of two
  // products.
  __device__ __forceinline__ void LoadValues(std::uint32_t (&b)[4], const unsigned char* values, int row, int n) const {
    LoadMatricesTransposed(b, values + Rows::Offset(row + lane_ % 16, n + lane_ / 16));
  }

  __device__ __forceinline__ void AddValues(const unsigned char* values, int first,
                                            const std::uint32_t (&weights)[kBlocks][kScoreTiles][2]) {
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      std::uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) ToLeft(weights[m], k, a[m]);
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        std::uint32_t b[4];
        LoadValues(b, values, first + 16 * k, n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          MultiplyAdd<T>(state_.values[m][n], a[m], b[0], b[1]);
          MultiplyAdd<T>(state_.values[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // The same if some values are not finite (nonfinite.cuh).
  __device__ __forceinline__ void AddGuardedValues(const unsigned char* values, int first,
                                                   const std::uint32_t (&weights)[kBlocks][kScoreTiles][2]) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        MarkSums marks;
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) {
          std::uint32_t a[4], b[4];
          ToLeft(weights[m], k, a);
          LoadValues(b, values, first + 16 * k, n);
          AddGuarded<T>(&state_.values[m][n], marks, a, b);
        }
        AddInfinities(&state_.values[m][n], marks);
      }
    }
  }

  __device__ __forceinline__ float* Memory(std::int64_t state) const {
    return p_.state.prefill_states + state * PrefillStateFloats(kDim);
  }

  // Ends a span that is followed by another one in this block.
  __device__ __forceinline__ void KeepSpan() {
    state_.SumRows();
    if (kept_) state_.template Merge</*kMemoryFirst=*/true>(Memory(blockIdx.x), unit_);
    state_.Store(Memory(blockIdx.x));
    kept_ = true;
    state_.Reset();
  }

  // Reduces the spans of a unit, which are all in memory, and writes the output.
  __device__ __forceinline__ void Merge(const PrefillItem& work) {
    // Loaded rather than merged into an empty state, so that a first span stays bit-identical.
    state_.Load(Memory(work.first_state + work.first_span));
#pragma unroll 1
    for (std::int32_t span = work.first_span + 1; span <= work.last_span; ++span) {
      state_.template Merge</*kMemoryFirst=*/false>(Memory(work.first_state + span), unit_);
    }
    state_.template Write<T>(p_, work);
  }

  const AttentionParams& p_;
  const bool plain_;
  const float unit_;  // ScoreUnit
  const TokenMap map_;
  unsigned char* const queries_;
  VisibleRange* const ranges_;  // [kWarps + 1] for each warp's rows, then for all rows
  unsigned char* const stages_;
  const int lane_, warp_;

  State state_;
  std::int32_t position_[kBlocks][2];
  bool kept_;  // spans before this one are in memory
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PREFILL_CUH_
