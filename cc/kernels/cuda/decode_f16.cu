#include "kernels/cuda/attend.h"
#include "kernels/cuda/decode.cuh"

namespace kvpage::cuda {

Status LaunchDecodeF16(AttentionParams params, Stream stream) { return LaunchDecode<F16>(params, stream); }

}  // namespace kvpage::cuda
