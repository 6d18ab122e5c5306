// The decode kernel for 16-bit storage: attention of up to 16 rows per sequence and KV head on tensor cores, bound by
// memory bandwidth (decode_loop.cuh).
#ifndef KVPAGE_KERNELS_CUDA_DECODE_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_CUH_

#include <cstdint>

#include "kernels/cuda/decode_loop.cuh"
#include "kernels/cuda/nonfinite.cuh"

namespace kvpage::cuda {

template <int kDim>
using DecodeShape = DecodeLayout<kDim, (kDim > 128 ? 32 : 64), 2>;

template <class T, int kDim>
class DecodeAttention : public DecodeLoop<DecodeAttention<T, kDim>, T, kDim, DecodeShape<kDim>, false> {
 protected:
  using Loop = DecodeLoop<DecodeAttention, T, kDim, DecodeShape<kDim>, false>;
  friend Loop;
  using Loop::kScoreTiles, Loop::kSteps, Loop::kTokens;
  using Loop::lane_, Loop::warp_, Loop::rule_, Loop::span_, Loop::p_, Loop::map_;
  using typename Loop::Rows;
  using typename Loop::State;
  static constexpr int kValueTiles = State::kTiles;

 public:
  __device__ __forceinline__ DecodeAttention(const AttentionParams& params, unsigned char* shared)
      : Loop(params, shared) {}

 protected:
  __device__ __forceinline__ void FetchTokens(const WorkUnit& unit, std::int32_t begin, int stage) const {
    const Tokens tokens(p_.checked->view, unit.sequence.slot, p_.checked->layer, unit.head);
    FetchTile<kDim, kTokens>(map_, tokens, begin, unit.begin, unit.end, this->Keys(stage), this->Values(stage));
  }

  __device__ __forceinline__ void ArrangeQueries() const {}

  __device__ __forceinline__ void Tile(std::int32_t begin, int stage) {
    float scores[kScoreTiles][4] = {};
    Dots(this->Keys(stage), warp_ * 8 * kScoreTiles, scores);
    const bool masked = this->Masked(begin);
    this->Score(begin, masked, scores);
    __syncthreads();

    float base[2], factor[2];
    this->RaiseMax(base, factor);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = Weight(scores[n][2 * half], base[half], rule_.unit);
        const float b = Weight(scores[n][2 * half + 1], base[half], rule_.unit);
        span_.sum[half] += a + b;
        this->StoreWeights(this->weights_, n, half, a, b);
      }
    }
    this->ScaleValues(factor);
    __syncthreads();
    if (this->mixed_ && masked && AnyNonFinite<T, kDim, kTokens>(this->Values(stage))) {
      AddGuardedValues(this->Values(stage));
    } else {
      AddValues(this->Values(stage));
    }
  }

  // Dot products of the rows with the warp's tokens of the tile, starting at `first`.
  __device__ __forceinline__ void Dots(const unsigned char* keys, int first, float (&scores)[kScoreTiles][4]) const {
    if constexpr (kScoreTiles == 2) {
      const int row = first + lane_ % 8 + lane_ / 16 * 8;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        std::uint32_t b[4];
        LoadMatrices(b, keys + Rows::Offset(row, 2 * k + lane_ / 8 % 2));
        std::uint32_t loaded[4];
        const auto& a = this->Query(k, loaded);
        MultiplyAdd<T>(scores[0], a, b[0], b[1]);
        MultiplyAdd<T>(scores[1], a, b[2], b[3]);
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
        std::uint32_t loaded[2][4];
        MultiplyAdd<T>(scores[0], this->Query(k, loaded[0]), b[0], b[1]);
        MultiplyAdd<T>(other, this->Query(k + 1, loaded[1]), b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][i] += other[i];
    }
  }

  // Loads the values of 16 tokens, columns 8 n to 8 n + 15 of the warp, as the right operands of two products.
  __device__ __forceinline__ void LoadValues(std::uint32_t (&b)[4], const unsigned char* values, int k, int n) const {
    LoadMatricesTransposed(b, values + Rows::Offset(16 * k + lane_ % 16, warp_ * kValueTiles + n + lane_ / 16));
  }

  __device__ __forceinline__ void AddValues(const unsigned char* values) {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      std::uint32_t a[4];
      this->LoadWeights(a, this->weights_, k);
#pragma unroll
      for (int n = 0; n < kValueTiles; n += 2) {
        std::uint32_t b[4];
        LoadValues(b, values, k, n);
        MultiplyAdd<T>(span_.values[n], a, b[0], b[1]);
        MultiplyAdd<T>(span_.values[n + 1], a, b[2], b[3]);
      }
    }
  }

  // The same if some values are not finite (nonfinite.cuh).
  __device__ __forceinline__ void AddGuardedValues(const unsigned char* values) {
#pragma unroll
    for (int n = 0; n < kValueTiles; n += 2) {
      MarkSums marks;
      for (int k = 0; k < kTokens / 16; ++k) {
        std::uint32_t a[4], b[4];
        this->LoadWeights(a, this->weights_, k);
        LoadValues(b, values, k, n);
        AddGuarded<T>(&span_.values[n], marks, a, b);
      }
      AddInfinities(&span_.values[n], marks);
    }
  }

  __device__ __forceinline__ void EndSpan(const WorkUnit& unit, std::int32_t span) { this->EndSpanState(unit, span); }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_CUH_
