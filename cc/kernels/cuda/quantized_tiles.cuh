// Tiles of quantized keys and values in shared memory, and their asynchronous copies.
#ifndef KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_
#define KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tiles.cuh"
#include "kernels/cuda/tokens.cuh"
#include "kernels/cuda/work.cuh"

namespace kvpage::cuda {

// Destination of a tile: keys and values, with rows laid out as in Rows, and kTokens scales for each.
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
    // Tiles begin at multiples of such a run.
    const std::int32_t chunk = map.chunk.divisor, run = chunk % kTokens == 0 ? kTokens : chunk;
    if (map.apart()) {
      FetchTileApart<kDim / 2, kTokens>(map, tokens, begin, from, to, keys, values);
    } else if (begin >= from && begin + kTokens <= to && kTokens % run == 0 && run % kStep == 0) {
      FetchRuns(map, tokens, begin, run);
    } else if (chunk >= kStep) {
      FetchAcrossChunks(map, tokens, begin, from, to);
    } else {
      FetchTile<kDim / 2, kTokens>(map, tokens, begin, from, to, keys, values);
    }
    // Each thread copies the scales of one token.
    if (kTokens < kThreads && Thread() >= kTokens) return;
    const std::int32_t token = begin + Thread();
    const bool valid = token >= from && token < to;
    const TokenMap::Place place = map.Find(tokens, valid ? token : from);
    const char* const scale = tokens.first + view.scale_base + head * (view.scale_head_stride - view.head_stride) +
                              place.chunk * map.chunk_stride + place.token * view.scale_token_stride;
    CopyAsync4(key_scales + Thread(), scale, valid);
    CopyAsync4(value_scales + Thread(), scale + map.ToValue(tokens, valid ? token : from), valid);
  }

 private:
  __device__ __forceinline__ static int Thread() { return static_cast<int>(threadIdx.x); }

  // Copies all tokens of the tile in runs of `run` tokens, each within one chunk. `run` is a multiple of kStep.
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

  // Copies any tile, if a chunk has at least kStep tokens (default blocks of quantized storage: 48, 240, 1984). A
  // thread's rows are kStep apart, so the next row is in the same chunk or in the one after.
  __device__ __forceinline__ void FetchAcrossChunks(const TokenMap& map, const Tokens& tokens, std::int32_t begin,
                                                    std::int32_t from, std::int32_t to) const {
    const int unit = Thread() % Rows::kUnits, first = Thread() / Rows::kUnits;
    const std::int32_t chunk = map.chunk.divisor;
    const char* const safe = map.Key(tokens, max(begin, from)) + unit * 16;
    const char* base = nullptr;
    std::int32_t index = map.chunk.Divide(begin + first), within = begin + first - index * chunk, known = -1;
    std::int64_t offset = within * map.token_stride + unit * 16;
#pragma unroll 4
    for (int i = 0; i < kTokens / kStep; ++i) {
      const int row = first + i * kStep;
      const bool valid = begin + row >= from && begin + row < to;
      if (valid && index != known) {  // the table is not read beyond the tokens
        base = tokens.first + (tokens.table != nullptr ? tokens.table[index] : index) * map.chunk_stride;
        known = index;
      }
      const char* const source = valid ? base + offset : safe;
      CopyAsync16(keys + Rows::Offset(row, unit), source, valid);
      CopyAsync16(values + Rows::Offset(row, unit), source + map.kv_stride, valid);
      within += kStep;
      offset += kStep * map.token_stride;
      if (within >= chunk) {
        within -= chunk;
        offset -= chunk * map.token_stride;
        ++index;
      }
    }
  }
};

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_QUANTIZED_TILES_CUH_
