// Kernels as the host sees them on the emulated device: attributes, which persist from launch to launch, loading of
// code, and graphs.
//
// The first call that names a kernel loads its code, as in CUDA (lazy loading). During a capture this is an error,
// unless the calling thread has changed its capture mode; even then it is counted, because code should be loaded
// earlier.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_
#define KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_

#include <cstddef>
#include <vector>

#include "testing/cuda_emulation/cuda_runtime.h"
#include "testing/cuda_emulation/emulator.h"

namespace kvpage::emulation {

// The kernels that were captured from a stream.
class Graph {
 public:
  // Until End, launches are captured instead of run. Only one capture at a time.
  void Begin();
  void End();
  // Checks the launch of each kernel against the kernel's current attributes.
  cudaError_t Instantiate() const;
  void Launch() const;
  // Launches two graphs on different streams: the i-th kernel of one runs concurrently with the i-th kernel of the
  // other.
  static void LaunchTogether(const Graph& a, const Graph& b);
  std::size_t size() const { return launches_.size(); }

 private:
  friend cudaError_t Queue(const KernelLaunch& launch);
  std::vector<KernelLaunch> launches_;
};

// Number of kernels whose code was loaded during a capture.
int NumLoadsInCapture();

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_
