#include "kernels/cuda/prefill.cuh"

namespace kvpage::cuda {

Status LaunchPrefillF16(AttentionParams params, Stream stream) { return LaunchPrefill<F16>(params, stream); }

}  // namespace kvpage::cuda
