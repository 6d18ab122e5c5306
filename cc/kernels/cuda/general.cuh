// The general kernel, for float32 storage or queries, any head size and alignment, queries of a 16-bit type other than
// that of the keys, and exact weights. Uses CUDA cores and float32 arithmetic.
//
// A tile of tokens is in shared memory in its storage type. Dot products: one lane per token; each warp computes a
// quarter of the columns for all rows, so that keys are read and converted once. Scores: one lane per token, every
// fourth row per warp. Values: each thread computes every 128th column for all rows. The weighted values of the span
// and of the unit are in shared memory.
#ifndef KVPAGE_KERNELS_CUDA_GENERAL_CUH_
#define KVPAGE_KERNELS_CUDA_GENERAL_CUH_

#include <cstdint>

#include "kernels/cuda/general_shared.cuh"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/tokens.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

template <class T>
class GeneralAttention {
 public:
  __device__ GeneralAttention(const AttentionParams& params, unsigned char* shared)
      : p_(params),
        view_(params.checked->view),
        layer_(params.checked->layer),
        rule_(params),
        map_(view_),
        row_bytes_(params.head_dim * static_cast<int>(sizeof(T))),
        columns_((row_bytes_ + 15) / 16 * 16 / static_cast<int>(sizeof(T))),
        copies_(max(row_bytes_ / 16, 1)),
        wide_(row_bytes_ % 16 == 0 && IsAligned(view_)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {
    const GeneralShared at = PlaceGeneral(p_.head_dim, columns_, p_.stages, p_.tile_tokens, p_.row_stride);
    queries_ = reinterpret_cast<float*>(shared + at.queries);
    span_ = reinterpret_cast<float*>(shared + at.span);
    unit_ = reinterpret_cast<float*>(shared + at.unit);
    weights_ = reinterpret_cast<float*>(shared + at.weights);
    dots_ = reinterpret_cast<float*>(shared + at.dots);
    factors_ = reinterpret_cast<float*>(shared + at.factors);
    scales_ = reinterpret_cast<float*>(shared + at.scales);
    tiles_ = shared + at.tiles;
  }

  __device__ void Run() {
    SplitPoint from, to;
    if (!FindPiece(p_, &from, &to)) return;
    WorkIterator<false> walker, ahead;
    walker.Start(p_, from, to, p_.tile_tokens);
    ahead.Start(p_, from, to, p_.tile_tokens);
    for (int stage = 0; stage < p_.stages - 1; ++stage) Fetch(ahead, stage, from, to);
    for (int stage = 0; !walker.done;) {
      WaitForStage(p_.stages);
      __syncthreads();
      Fetch(ahead, stage == 0 ? p_.stages - 1 : stage - 1, from, to);
      const WorkUnit& unit = walker.unit;
      if (walker.FirstTile()) BeginUnit(unit);
      const std::int32_t next = walker.token + p_.tile_tokens;
      // Fewer rows need less work per token.
      if (unit.rows <= kWarps) {
        Tile<1>(unit, walker.token, stage);
      } else if (unit.rows <= 2 * kWarps) {
        Tile<2>(unit, walker.token, stage);
      } else {
        Tile<4>(unit, walker.token, stage);
      }
      const bool last = next >= walker.ItemEnd();
      if (last || (next & ((1 << unit.shift) - 1)) == 0) EndSpan(unit, (next - 1) >> unit.shift);
      if (last) EndUnit(unit);
      walker.Next(p_, from, to, p_.tile_tokens);
      if (++stage == p_.stages) stage = 0;
    }
    WaitForCopies<0>();
  }

 private:
  __device__ unsigned char* Row(int stage, int which, int token) const {
    return tiles_ + ((stage * 2 + which) * p_.tile_tokens + token) * p_.row_stride;
  }
  __device__ float* Scales(int stage, int which) const { return scales_ + (stage * 2 + which) * kGeneralTokens; }

  // Starts loading the next tile, with zeros for tokens that no row of the unit sees.
  __device__ void Fetch(WorkIterator<false>& ahead, int stage, const SplitPoint& from, const SplitPoint& to) {
    if (!ahead.done) {
      const WorkUnit& unit = ahead.unit;
      const Tokens tokens(view_, unit.sequence.slot, layer_, unit.head);
      if (wide_) {
        FetchWide(tokens, unit, ahead.token, stage);
      } else {
        FetchElements(tokens, unit, ahead.token, stage);
      }
      if constexpr (kIsQuantized<T>) FetchScales(unit, ahead.token, stage);
      ahead.Next(p_, from, to, p_.tile_tokens);
    }
    CommitCopies();
  }

  __device__ void FetchWide(const Tokens& tokens, const WorkUnit& unit, std::int32_t begin, int stage) {
    const int count = p_.tile_tokens * copies_.divisor;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int row = copies_.Divide(i), offset = (i - row * copies_.divisor) * 16;
      const std::int32_t token = begin + row;
      const bool valid = token >= unit.begin && token < unit.end;
      const char* key = map_.Key(tokens, valid ? token : unit.begin) + offset;
      CopyAsync16(Row(stage, 0, row) + offset, key, valid);
      CopyAsync16(Row(stage, 1, row) + offset, key + map_.ToValue(tokens, valid ? token : unit.begin), valid);
    }
  }

  __device__ void FetchElements(const Tokens& tokens, const WorkUnit& unit, std::int32_t begin, int stage) {
    for (int row = warp_; row < p_.tile_tokens; row += kWarps) {
      const std::int32_t token = begin + row;
      const bool valid = token >= unit.begin && token < unit.end;
      const char* key = map_.Key(tokens, valid ? token : unit.begin);
      for (int which = 0; which < 2; ++which, key += map_.ToValue(tokens, valid ? token : unit.begin)) {
        const T* from = reinterpret_cast<const T*>(key);
        T* to = reinterpret_cast<T*>(Row(stage, which, row));
        for (int d = lane_; d < columns_; d += kWarpSize) to[d] = valid && d < p_.head_dim ? from[d] : T{};
      }
    }
  }

  __device__ void FetchScales(const WorkUnit& unit, std::int32_t begin, int stage) {
    if (static_cast<int>(threadIdx.x) >= 2 * kGeneralTokens) return;
    const int which = threadIdx.x / kGeneralTokens, row = threadIdx.x % kGeneralTokens;
    const std::int32_t token = begin + row;
    const bool valid = row < p_.tile_tokens && token >= unit.begin && token < unit.end;
    CopyAsync4(Scales(stage, which) + row,
               view_.Scale(unit.sequence.slot, valid ? token : unit.begin, layer_, which, unit.head), valid);
  }

  __device__ void BeginUnit(const WorkUnit& unit) {
    for (int r = warp_; r < kTileRows; r += kWarps) {
      const std::int64_t index = r < unit.rows ? RowIndex(p_, unit, r) * p_.head_dim : 0;
      for (int d = lane_; d < columns_; d += kWarpSize) {
        const bool there = r < unit.rows && d < p_.head_dim;
        queries_[r * columns_ + d] = there ? LoadElement(p_.q, p_.q_dtype, index + d) : 0.0f;
      }
    }
    for (int i = threadIdx.x; i < kTileRows * p_.head_dim; i += kThreads) span_[i] = unit_[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kTileRows / kWarps; ++i) {
      max_[i] = unit_max_[i] = NegativeInfinity();
      sum_[i] = unit_sum_[i] = 0.0f;
      const int row = min(warp_ + i * kWarps, unit.rows - 1);
      position_[i] = RowPosition(p_, unit, row);
      slope_[i] = rule_.alibi ? p_.options.alibi_slopes[RowHead(p_, unit, row)] : 0.0f;
    }
    __syncthreads();
  }

  // kRows: rows per warp.
  template <int kRows>
  __device__ void Tile(const WorkUnit& unit, std::int32_t begin, int stage) {
    float dots[kRows] = {};
    if (lane_ < p_.tile_tokens) StoreDots<kRows * kWarps>(Row(stage, 0, lane_));
    __syncthreads();
    if (lane_ < p_.tile_tokens) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) dots[i] += *Dot(w, warp_ + i * kWarps);
      }
    }
    const std::int32_t window = p_.checked->sliding_window;
    const std::int32_t token = begin + lane_;
    const bool there = lane_ < p_.tile_tokens && token >= unit.begin && token < unit.end;
    float key_scale = 1.0f, value_scale = 1.0f;
    if constexpr (kIsQuantized<T>) {
      key_scale = there ? Scales(stage, 0)[lane_] : 0.0f;
      value_scale = there ? Scales(stage, 1)[lane_] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_ + i * kWarps;
      if (row >= unit.rows) {
        weights_[row * kGeneralTokens + lane_] = 0.0f;
        if (lane_ == 0) factors_[row] = 1.0f;
        continue;
      }
      const bool visible = there && token <= position_[i] && token >= FirstVisible(position_[i], window);
      const float score =
          visible ? rule_.Score(dots[i] * key_scale, slope_[i], token - position_[i]) : NegativeInfinity();
      float top = score;
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, step));
      top = fmaxf(top, max_[i]);
      const float base = Base(top), factor = Weight(max_[i], base, rule_.unit);
      const float weight = visible ? Weight(score, base, rule_.unit) : 0.0f;
      float sum = weight;
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      max_[i] = top;
      sum_[i] = fmaf(sum_[i], factor, sum);
      weights_[row * kGeneralTokens + lane_] = visible ? weight * value_scale : 0.0f;
      if (lane_ == 0) factors_[row] = factor;
    }
    __syncthreads();
    // If rows see different tokens, a value may be infinite or NaN for rows that do not see it.
    const std::int32_t first = RowPosition(p_, unit, 0), last = RowPosition(p_, unit, unit.rows - 1);
    const bool guarded = first != last && VisibleRange::Of(first, last, window).Mixed(begin, p_.tile_tokens);
    if (guarded) {
      Values<kRows, true>(stage);
    } else {
      Values<kRows, false>(stage);
    }
  }

  // The part of the product of a row with the lane's key that warp `w` computes.
  __device__ float* Dot(int w, int row) const { return dots_ + (w * kTileRows + row) * p_.tile_tokens + lane_; }

  template <int kAll>
  __device__ void StoreDots(const unsigned char* key) const {
    constexpr int kElements = kVectorElements<T>;
    float dots[kAll] = {};
    for (int d = warp_ * kElements; d < columns_; d += kWarps * kElements) {
      const Vector<T, kElements> k = LoadVector<T, kElements>(reinterpret_cast<const T*>(key) + d);
#pragma unroll
      for (int j = 0; j < kElements; j += 4) {
        const float x[4] = {ToFloat(k.at[j]), ToFloat(k.at[j + 1]), ToFloat(k.at[j + 2]), ToFloat(k.at[j + 3])};
#pragma unroll
        for (int r = 0; r < kAll; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(queries_ + r * columns_ + d + j);
          dots[r] = fmaf(q.w, x[3], fmaf(q.z, x[2], fmaf(q.y, x[1], fmaf(q.x, x[0], dots[r]))));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kAll; ++r) *Dot(warp_, r) = dots[r];
  }

  template <int kRows, bool kGuarded>
  __device__ void Values(int stage) const {
    constexpr int kAll = kRows * kWarps;
    const unsigned char* tile = Row(stage, 1, 0);
    for (int d = threadIdx.x; d < p_.head_dim; d += kThreads) {
      float sums[kAll] = {};
#pragma unroll 2
      for (int token = 0; token < p_.tile_tokens; token += 4) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned char* const row = tile + (token + i) * p_.row_stride;
          v[i] = token + i < p_.tile_tokens ? ToFloat(reinterpret_cast<const T*>(row)[d]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kAll; ++r) {
          const float4 w = *reinterpret_cast<const float4*>(weights_ + r * kGeneralTokens + token);
          const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!kGuarded || weight[i] != 0.0f) sums[r] = fmaf(weight[i], v[i], sums[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kAll; ++r) {
        float& value = span_[r * p_.head_dim + d];
        value = fmaf(value, factors_[r], sums[r]);
      }
    }
  }

  // Merges the span into the unit's state, or stores it for the block that reduces the unit.
  __device__ void EndSpan(const WorkUnit& unit, std::int32_t span) {
    const bool keep = unit.split_index < 0 || IsFirstItem(unit);
    __syncthreads();  // factors_ of the tile have been read
#pragma unroll
    for (int i = 0; i < kTileRows / kWarps; ++i) {
      const int row = warp_ + i * kWarps;
      if (row < unit.rows && keep) {
        const StateMerge merge(unit_max_[i], unit_sum_[i], max_[i], sum_[i], rule_.unit);
        unit_max_[i] = merge.max;
        unit_sum_[i] = merge.sum;
        if (lane_ == 0) {
          factors_[row] = merge.a;
          factors_[kTileRows + row] = merge.b;
        }
      } else if (row < unit.rows && lane_ == 0) {
        p_.state.partial_sums[StateIndex(p_, unit, row, span - unit.first_span)] = make_float2(max_[i], sum_[i]);
      }
      max_[i] = NegativeInfinity();
      sum_[i] = 0.0f;
    }
    __syncthreads();
    for (int row = 0; row < unit.rows; ++row) {
      const float a = factors_[row], b = factors_[kTileRows + row];
      float* state =
          keep ? nullptr : p_.state.partial_values + StateIndex(p_, unit, row, span - unit.first_span) * p_.head_dim;
      for (int d = threadIdx.x; d < p_.head_dim; d += kThreads) {
        const int at = row * p_.head_dim + d;
        if (keep) {
          unit_[at] = __fmaf_rn(unit_[at], a, __fmul_rn(span_[at], b));
        } else {
          state[d] = span_[at];
        }
        span_[at] = 0.0f;
      }
    }
    __syncthreads();
  }

  __device__ void EndUnit(const WorkUnit& unit) {
    const bool alone = unit.split_index < 0;
    if (alone || IsFirstItem(unit)) {
#pragma unroll
      for (int i = 0; i < kTileRows / kWarps; ++i) {
        const int row = warp_ + i * kWarps;
        if (row >= unit.rows) continue;
        if (!alone) {
          const std::int64_t state = StateIndex(p_, unit, row, 0);
          for (int d = lane_; d < p_.head_dim; d += kWarpSize) {
            p_.state.partial_values[state * p_.head_dim + d] = unit_[row * p_.head_dim + d];
          }
          if (lane_ == 0) p_.state.partial_sums[state] = make_float2(unit_max_[i], unit_sum_[i]);
          continue;
        }
        const Normalization norm(p_, RowHead(p_, unit, row), unit_max_[i], unit_sum_[i]);
        const std::int64_t index = RowIndex(p_, unit, row);
        for (int d = lane_; d < p_.head_dim; d += kWarpSize) {
          StoreElement(p_.out, p_.q_dtype, index * p_.head_dim + d, unit_[row * p_.head_dim + d] * norm.factor);
        }
        if (lane_ == 0 && p_.lse != nullptr) p_.lse[index] = norm.lse;
      }
    }
    if (!alone) EndItem(p_, unit);
  }

  const AttentionParams& p_;
  const KVView& view_;
  const std::int32_t layer_;
  const ScoreRule<true> rule_;
  const TokenMap map_;
  const int row_bytes_, columns_;
  const Divider copies_;
  const bool wide_;  // rows can be copied 16 bytes at a time
  const int lane_, warp_;
  float *queries_, *span_, *unit_, *weights_, *dots_, *factors_, *scales_;
  unsigned char* tiles_;
  // For row warp_ + i * kWarps: the state of the current span and of the spans before.
  float max_[kTileRows / kWarps], sum_[kTileRows / kWarps];
  float unit_max_[kTileRows / kWarps], unit_sum_[kTileRows / kWarps];
  float slope_[kTileRows / kWarps];
  std::int32_t position_[kTileRows / kWarps];
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_GENERAL_CUH_
