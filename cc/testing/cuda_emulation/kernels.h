// Kernels as the host sees them on the emulated device: their attributes, which are state that lasts from launch to
// launch, the loading of their code, and graphs.
//
// A kernel's code is loaded by the first call that names the kernel, as CUDA does it (lazy loading). During a capture
// that is an error unless the calling thread has exchanged its capture mode, and even then it is counted: code should
// be loaded before.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_
#define KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_

#include <cstddef>
#include <vector>

#include "testing/cuda_emulation/cuda_runtime.h"
#include "testing/cuda_emulation/emulator.h"

namespace kvpage::emulation {

// Kernels that a stream has captured.
class Graph {
 public:
  // From here to End launches are captured and do not run. One capture at a time.
  void Begin();
  void End();
  // Checks each kernel's launch against the attributes that it has now.
  cudaError_t Instantiate() const;
  void Launch() const;
  // Launches two on different streams: each kernel of one runs at the same time as the other's of that number.
  static void LaunchTogether(const Graph& a, const Graph& b);
  std::size_t size() const { return launches_.size(); }

 private:
  friend cudaError_t Queue(const KernelLaunch& launch);
  std::vector<KernelLaunch> launches_;
};

// Kernels whose code was loaded while a capture was open.
int NumLoadsInCapture();

}  // namespace kvpage::emulation

#endif  // KVPAGE_TESTING_CUDA_EMULATION_KERNELS_H_
