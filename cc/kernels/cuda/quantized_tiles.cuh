// Tiles of quantized keys and values in shared memory, and their asynchronous copies.
#ifndef KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_
#define KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/tokens.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Where a tile goes: keys and values, rows as in Rows, and kTokens scales of each.
template <int kDim, int kTokens>
struct QuantizedTile {
  using Rows = TileRows<kDim / 2>;                       // of kDim bytes
  static constexpr int kStep = kThreads / Rows::kUnits;  // rows that the block copies at a time
  static_assert(kTokens % kStep == 0 && kTokens <= kThreads);

  unsigned char *keys, *values;
  float *key_scales, *value_scales;

  // Starts copying the tile that begins at token `begin`; zeros outside [from, to).
  __device__ __forceinline__ void Fetch(const KVView& view, const TokenMap& map, const Tokens& tokens,
                                        std::int32_t head, std::int32_t begin, std::int32_t from,
                                        std::int32_t to) const {
    // A tile begins at a multiple of such runs.
    const std::int32_t chunk = map.chunk.divisor, run = chunk % kTokens == 0 ? kTokens : chunk;
    if (begin >= from && begin + kTokens <= to && kTokens % run == 0 && run % kStep == 0) {
      FetchRuns(map, tokens, begin, run);
    } else {
      FetchTile<kDim / 2, kTokens>(map, tokens, begin, from, to, keys, values);
    }
    // The scales of one token a thread.
    if (kTokens < kThreads && Thread() >= kTokens) return;
    const std::int32_t token = begin + Thread();
    const bool valid = token >= from && token < to;
    const TokenMap::Place place = map.Find(tokens, valid ? token : from);
    const char* const scale = tokens.first + view.scale_base + head * (view.scale_head_stride - view.head_stride) +
                              place.chunk * map.chunk_stride + place.token * view.scale_token_stride;
    CopyAsync4(key_scales + Thread(), scale, valid);
    CopyAsync4(value_scales + Thread(), scale + map.kv_stride, valid);
  }

 private:
  __device__ __forceinline__ static int Thread() { return static_cast<int>(threadIdx.x); }

  // All tokens of the tile, in runs of `run` tokens that lie in one chunk: a multiple of kStep.
  __device__ __forceinline__ void FetchRuns(const TokenMap& map, const Tokens& tokens, std::int32_t begin,
                                            std::int32_t run) const {
    const int unit = Thread() % Rows::kUnits, first = Thread() / Rows::kUnits;
    const char* key = nullptr;
#pragma unroll
    for (int i = 0; i < kTokens / kStep; ++i) {
      if ((i * kStep & (run - 1)) == 0) key = map.Key(tokens, begin + i * kStep) + first * map.token_stride + unit * 16;
      const int offset = Rows::Offset(first + i * kStep, unit);
      CopyAsync16(keys + offset, key, true);
      CopyAsync16(values + offset, key + map.kv_stride, true);
      key += kStep * map.token_stride;
    }
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_
