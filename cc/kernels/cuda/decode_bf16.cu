#include "kernels/cuda/attend.h"
#include "kernels/cuda/decode.cuh"

namespace kvpage::cuda {

Status LaunchDecodeBf16(AttentionParams params, Stream stream) { return LaunchDecode<Bf16>(params, stream); }

}  // namespace kvpage::cuda
