// Prefill of bfloat16.
#include "kernels/cuda/prefill_launch.cuh"

namespace kvpage::cuda {

Status LaunchPrefillBf16(AttentionParams params, Stream stream) { return LaunchPrefill<Bf16>(params, stream); }

}  // namespace kvpage::cuda
