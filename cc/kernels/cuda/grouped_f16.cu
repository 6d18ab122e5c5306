// Shared prefixes of float16.
#include "kernels/cuda/grouped_launch.cuh"

namespace kvpage::cuda {

Status LaunchGroupedF16(AttentionParams params, Stream stream) { return LaunchGrouped<F16>(params, stream); }

}  // namespace kvpage::cuda
