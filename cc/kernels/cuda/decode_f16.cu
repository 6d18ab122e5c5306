// Decode of float16.
#include "kernels/cuda/decode_launch.cuh"

namespace kvpage::cuda {

Status LaunchDecodeF16(AttentionParams params, Stream stream) { return LaunchDecode<F16>(params, stream); }

}  // namespace kvpage::cuda
