// Decode of float8_e4m3fn storage.
#include "kernels/cuda/decode_quantized_launch.cuh"

namespace kvpage::cuda {

Status LaunchDecodeFloat8(AttentionParams params, Stream stream) {
  return params.q_dtype == DType::kF16 ? LaunchDecodeQuantized<Float8, F16>(params, stream)
                                       : LaunchDecodeQuantized<Float8, Bf16>(params, stream);
}

}  // namespace kvpage::cuda
