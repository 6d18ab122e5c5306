// Attention behind a check: what attend.cu puts together and the kernels' files launch.
#ifndef KVPAGE_KERNELS_CUDA_ATTEND_H_
#define KVPAGE_KERNELS_CUDA_ATTEND_H_

#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/scratch.h"

namespace kvpage::cuda {

struct AttentionParams;

// Attention of a batch whose check left its CheckedBatch at the start of `scratch`. `aligned`: every key and value
// begins at a multiple of 16 bytes.
Status LaunchAttention(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                       bool aligned, void* scratch, Stream stream);

// One file each, so that they are compiled side by side. Each may change what the kernel's shape decides: the stages
// of its pipeline and the like.
Status LaunchGeneral(DType storage, AttentionParams params, Stream stream);
Status LaunchDecodeBf16(AttentionParams params, Stream stream);
Status LaunchDecodeF16(AttentionParams params, Stream stream);
Status LaunchPrefillBf16(AttentionParams params, Stream stream);
Status LaunchPrefillF16(AttentionParams params, Stream stream);

// Shared memory of the current device in bytes: that a block can have, and that it can have beside another one.
struct SharedLimits {
  std::int64_t alone = 0;
  std::int64_t beside = 0;
};
Status GetSharedLimits(SharedLimits* limits);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_ATTEND_H_
