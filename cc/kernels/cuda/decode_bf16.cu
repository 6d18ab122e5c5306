// Decode of bfloat16.
#include "kernels/cuda/decode_launch.cuh"

namespace kvpage::cuda {

Status LaunchDecodeBf16(AttentionParams params, Stream stream) { return LaunchDecode<Bf16>(params, stream); }

}  // namespace kvpage::cuda
