// Decode of int8 storage.
#include "kernels/cuda/decode_quantized_launch.cuh"

namespace kvpage::cuda {

Status LaunchDecodeInt8(AttentionParams params, Stream stream) {
  return params.q_dtype == DType::kF16 ? LaunchDecodeQuantized<Int8, F16>(params, stream)
                                       : LaunchDecodeQuantized<Int8, Bf16>(params, stream);
}

}  // namespace kvpage::cuda
