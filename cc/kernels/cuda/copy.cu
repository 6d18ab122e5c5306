// Copies full blocks at memory bandwidth, for forks and swaps.
#include "kernels/cuda/device.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // 16-byte loads that a thread issues before its stores
constexpr std::int64_t kTileBytes = std::int64_t{kThreads} * kInFlight * 16;  // copied by a thread block

__global__ void __launch_bounds__(kThreads)
    CopyKernel(const BlockCopy* copies, std::int64_t tiles, std::int64_t block_bytes) {
  const BlockCopy copy = copies[blockIdx.x / tiles];
  const std::int64_t begin = blockIdx.x % tiles * kTileBytes + threadIdx.x * 16;
  const char* const from = static_cast<const char*>(copy.from);
  char* const to = static_cast<char*>(copy.to);
  uint4 loaded[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const std::int64_t at = begin + i * (kThreads * 16);
    if (at < block_bytes) loaded[i] = __ldcs(reinterpret_cast<const uint4*>(from + at));
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const std::int64_t at = begin + i * (kThreads * 16);
    if (at < block_bytes) __stcs(reinterpret_cast<uint4*>(to + at), loaded[i]);
  }
}

}  // namespace

Status CopyBlocks(const BlockCopy* copies, std::int64_t count, std::int64_t block_bytes, Stream stream) {
  if (count == 0) return {};
  if (block_bytes <= 0 || block_bytes % 16 != 0) {
    return InvalidArgument("block_bytes is " + std::to_string(block_bytes) + ", wanted a positive multiple of 16");
  }
  const std::int64_t tiles = CeilDiv(block_bytes, kTileBytes);
  const LaunchShape shape = {static_cast<unsigned>(count * tiles), kThreads, 0, false};
  return Launch<CopyKernel>("copy_blocks", shape, stream, copies, tiles, block_bytes);
}

}  // namespace kvpage::cuda
