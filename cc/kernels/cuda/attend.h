// The launch functions of attention, shared by attend.cu and the kernel files.
#ifndef KVPAGE_KERNELS_CUDA_ATTEND_H_
#define KVPAGE_KERNELS_CUDA_ATTEND_H_

#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/scratch.h"

namespace kvpage::cuda {

struct AttentionParams;

// Attention of a batch whose check left its CheckedBatch at the start of `scratch` (AttentionBytes and PlanBytes), with
// a plan made for this call. `aligned`: the address of every key and value is a multiple of 16 bytes.
Status LaunchAttention(const AttentionOperands& attention, std::int64_t num_sequences, std::int64_t num_tokens,
                       bool aligned, void* scratch, Stream stream);

// Each is in its own file, so that they compile in parallel. They fill in the parameters that depend on the kernel's
// shape, such as the number of pipeline stages.
Status LaunchGeneral(DType storage, AttentionParams params, Stream stream);
Status LaunchDecodeBf16(AttentionParams params, Stream stream);
Status LaunchDecodeF16(AttentionParams params, Stream stream);
Status LaunchDecodeFloat8(AttentionParams params, Stream stream);
Status LaunchDecodeInt8(AttentionParams params, Stream stream);
Status LaunchGroupedBf16(AttentionParams params, Stream stream);
Status LaunchGroupedF16(AttentionParams params, Stream stream);
Status LaunchPrefillBf16(AttentionParams params, Stream stream);
Status LaunchPrefillF16(AttentionParams params, Stream stream);

// Dynamic shared memory available to a block of the current device, in bytes.
struct SharedLimits {
  std::int64_t alone = 0;   // with one block per multiprocessor
  std::int64_t beside = 0;  // with two blocks per multiprocessor
};
Status GetSharedLimits(SharedLimits* limits);

// Rows that a block of the grouped kernel processes at a time on the current device (AttentionParams::group_rows).
Status GetGroupRows(std::int32_t head_dim, std::int32_t* rows);

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_ATTEND_H_
