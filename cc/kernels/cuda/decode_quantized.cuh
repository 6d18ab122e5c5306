// The decode kernel for quantized storage (decode_loop.cuh). Also used for prefill, 16 rows at a time.
//
// Stages hold the stored bytes. ldmatrix gives each thread four bytes where it needs elements of a product's right
// operand: four columns of a key, or two columns of the values of two tokens. So every element is converted once, in
// registers. One product multiplies the even elements of the four, another the odd ones, and columns are permuted to
// match: those of the queries when a unit begins, those of the weighted values when they are written. Scores are
// multiplied by the scale of their key, weights by that of their value.
#ifndef KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_CUH_
#define KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_loop.cuh"
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/quantized_tiles.cuh"

namespace kvpage::cuda {

template <int kDim>
using DecodeQuantizedShape = DecodeLayout<kDim, (kDim > 128 ? 32 : 128), 1>;

// S is the stored type, T the type of queries and products.
template <class S, class T, int kDim>
class DecodeQuantized : public DecodeLoop<DecodeQuantized<S, T, kDim>, T, kDim, DecodeQuantizedShape<kDim>, true> {
  using Shape = DecodeQuantizedShape<kDim>;
  using Loop = DecodeLoop<DecodeQuantized, T, kDim, Shape, true>;
  friend Loop;
  using Loop::kScoreTiles, Loop::kSteps, Loop::kTokens;
  using Loop::lane_, Loop::warp_, Loop::rule_, Loop::span_, Loop::p_, Loop::map_;
  using typename Loop::Rows;
  using typename Loop::State;
  using StoredTile = QuantizedTile<kDim, kTokens>;
  static constexpr int kValueUnits = State::kTiles / 2;  // 16 columns each, per warp
  // Weights times scales may exceed the range of float16. So scales are divided by a power of two, taken from the
  // largest scale that the row has seen in the span.
  static constexpr bool kNarrow = std::is_same_v<T, F16>;

 public:
  __device__ __forceinline__ DecodeQuantized(const AttentionParams& params, unsigned char* shared)
      : Loop(params, shared), largest_(this->sums_ + kWarps * kTileRows) {
    ResetUnits();
  }

 private:
  __device__ __forceinline__ float* Scales(int stage, int which) const {
    return reinterpret_cast<float*>(this->Queries(stage) + Shape::kQueryBytes) + which * kTokens;
  }

  // The scales of the two tokens of score tile n that the thread holds.
  __device__ __forceinline__ float2 TwoScales(int stage, int which, int n) const {
    return *reinterpret_cast<const float2*>(Scales(stage, which) + (warp_ * kScoreTiles + n) * 8 + lane_ % 4 * 2);
  }

  __device__ __forceinline__ void FetchTokens(const WorkUnit& unit, std::int32_t begin, int stage) const {
    const KVView& view = p_.checked->view;
    const Tokens tokens(view, unit.sequence.slot, p_.checked->layer, unit.head);
    const StoredTile tile = {this->Keys(stage), this->Values(stage), Scales(stage, 0), Scales(stage, 1)};
    tile.Fetch(view, map_, tokens, unit.head, begin, unit.begin, unit.end);
  }

  // Reorders every 16 columns of the unit's queries so that the even ones come first. All threads must call it.
  __device__ __forceinline__ void ArrangeQueries() const {
    constexpr int kCount = kTileRows * kSteps;
#pragma unroll
    for (int done = 0; done < kCount; done += kThreads) {
      const int i = done + static_cast<int>(threadIdx.x);
      if (kCount - done < kThreads && i >= kCount) break;
      const int row = i / kSteps, k = i % kSteps;
      uint4& first = *reinterpret_cast<uint4*>(this->Queries() + Rows::Offset(row, 2 * k));
      uint4& second = *reinterpret_cast<uint4*>(this->Queries() + Rows::Offset(row, 2 * k + 1));
      const uint4 a = first, b = second;
      constexpr unsigned kEven = 0x5410, kOdd = 0x7632;
      first = {__byte_perm(a.x, a.y, kEven), __byte_perm(a.z, a.w, kEven), __byte_perm(b.x, b.y, kEven),
               __byte_perm(b.z, b.w, kEven)};
      second = {__byte_perm(a.x, a.y, kOdd), __byte_perm(a.z, a.w, kOdd), __byte_perm(b.x, b.y, kOdd),
                __byte_perm(b.z, b.w, kOdd)};
    }
    __syncthreads();
  }

  __device__ __forceinline__ void Tile(std::int32_t begin, int stage) {
    float scores[kScoreTiles][4] = {};
    Dots(this->Keys(stage), scores);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float2 scale = TwoScales(stage, 0, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = __fmul_rn(scores[n][i], i % 2 == 0 ? scale.x : scale.y);
    }
    const bool masked = this->Masked(begin);
    this->Score(begin, masked, scores);
    if constexpr (kNarrow) FindLargest(begin, masked, stage);
    __syncthreads();

    float base[2], rescale[2], inverse[2] = {1.0f, 1.0f};
    this->RaiseMax(base, rescale);
    if constexpr (kNarrow) RaiseUnits(rescale, inverse);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float2 scale = TwoScales(stage, 1, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = Weight(scores[n][i], base[i / 2], rule_.unit);
        span_.sum[i / 2] += weight;
        const float factor = i % 2 == 0 ? scale.x : scale.y;
        scores[n][i] = weight * (kNarrow ? factor * inverse[i / 2] : factor);
      }
    }
    if (masked) {  // the scale of a token that the row does not see may be NaN
      this->ForScores([&](int n, int i) {
        if (!this->Sees(i / 2, this->Token(begin, n, i))) scores[n][i] = 0.0f;
      });
    }
    unsigned char* const weights = this->Keys(stage);  // all warps have used the keys
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      this->StoreWeights(weights, n, 0, scores[n][0], scores[n][1]);
      this->StoreWeights(weights, n, 1, scores[n][2], scores[n][3]);
    }
    this->ScaleValues(rescale);
    __syncthreads();
    AddValues(weights, this->Values(stage));
  }

  __device__ __forceinline__ void Dots(const unsigned char* keys, float (&scores)[kScoreTiles][4]) const {
    // At least two accumulators, so that consecutive products are independent.
    constexpr int kChains = kScoreTiles == 1 ? 2 : 1;
    float sums[kScoreTiles][kChains][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; k += 4) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        std::uint32_t bytes[4];
        LoadMatrices(bytes, keys + StoredTile::Rows::Offset((warp_ * kScoreTiles + n) * 8 + lane_ % 8, k + lane_ / 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          std::uint32_t loaded[4];
          MultiplyAdd<T>(sums[n][i % kChains], this->Query(k + i, loaded), Dequantize<S, T>::Even(bytes[i]),
                         Dequantize<S, T>::Odd(bytes[i]));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = kChains == 2 ? sums[n][0][i] + sums[n][kChains - 1][i] : sums[n][0][i];
    }
  }

  __device__ __forceinline__ void AddValues(const unsigned char* weights, const unsigned char* values) {
#pragma unroll
    for (int k = 0; k < kTokens / 16; k += 2) {
      std::uint32_t a[2][4];
      this->LoadWeights(a[0], weights, k);
      this->LoadWeights(a[1], weights, k + 1);
#pragma unroll
      for (int n = 0; n < kValueUnits; ++n) {
        std::uint32_t bytes[4];
        LoadMatricesTransposed(bytes, values + StoredTile::Rows::Offset(16 * k + lane_, warp_ * kValueUnits + n));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const std::uint32_t low = bytes[2 * i], high = bytes[2 * i + 1];
          MultiplyAdd<T>(span_.values[2 * n], a[i], Dequantize<S, T>::Even(low), Dequantize<S, T>::Even(high));
          MultiplyAdd<T>(span_.values[2 * n + 1], a[i], Dequantize<S, T>::Odd(low), Dequantize<S, T>::Odd(high));
        }
      }
    }
  }

  // Stores in largest_ the largest of the warp's scales that each row sees.
  __device__ __forceinline__ void FindLargest(std::int32_t begin, bool masked, int stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = 0.0f;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        const float2 scale = TwoScales(stage, 1, n);
        if (!masked || this->Sees(half, this->Token(begin, n, 0))) largest = fmaxf(largest, scale.x);
        if (!masked || this->Sees(half, this->Token(begin, n, 1))) largest = fmaxf(largest, scale.y);
      }
      largest = this->RowMax(largest);
      if (lane_ % 4 == 0) largest_[warp_ * kTileRows + State::Row(lane_, half)] = largest;
    }
  }

  // Raises the units so that the tile's scales are at most 2 units, and adjusts the factor of the weighted values.
  __device__ __forceinline__ void RaiseUnits(float (&factor)[2], float (&inverse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int largest = __float_as_int(this->AllWarps(largest_, half, units_[half])) & 0x7f800000;
      const float unit = __int_as_float(min(largest, 253 << 23));
      inverse[half] = __int_as_float((254 << 23) - __float_as_int(unit));
      factor[half] *= units_[half] * inverse[half];
      units_[half] = unit;
    }
  }
  __device__ __forceinline__ void ResetUnits() { units_[0] = units_[1] = __int_as_float(1 << 23); }

  __device__ __forceinline__ void EndSpan(const WorkUnit& unit, std::int32_t span) {
    if constexpr (kNarrow) {
      this->ScaleValues(units_);
      ResetUnits();
    }
    this->EndSpanState(unit, span);
  }

  float* const largest_;  // [kWarps, kTileRows], only if T is float16
  float units_[2];        // of the span's weighted values
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DECODE_QUANTIZED_CUH_
