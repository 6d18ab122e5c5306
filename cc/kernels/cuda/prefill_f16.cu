// Prefill of float16.
#include "kernels/cuda/prefill_launch.cuh"

namespace kvpage::cuda {

Status LaunchPrefillF16(AttentionParams params, Stream stream) { return LaunchPrefill<F16>(params, stream); }

}  // namespace kvpage::cuda
