// Launches of kernels, with error messages.
//
// Launch<Kernel> adds the kernel to a list when the library is loaded, and LoadKernels (kernels.h) goes through the
// list: CUDA loads a kernel's code at its first use, which may block and must not happen during a graph capture. A
// kernel's attributes are set at the same time and never again, because all launches and instantiated graphs share
// them.
#ifndef KVPAGE_KERNELS_CUDA_LAUNCH_CUH_
#define KVPAGE_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <utility>

#include "base/max_devices.h"
#include "base/status.h"
#include "kernels/cuda/kernels.h"

namespace kvpage::cuda {

// Maximum static shared memory of a kernel: a few variables, padded to the alignment of the dynamic shared memory.
inline constexpr int kMaxStaticSharedBytes = 1024;

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  // The kernel may start while the previous kernel on the stream is still running (programmatic dependent launch).
  // Every thread must call WaitForPriorKernel() before it accesses memory that the previous kernel uses. Only valid
  // after a kernel of the same op: kernels that XLA queues do not wait. Ignored if the kernel's code has no such wait
  // (KernelRecord::Load).
  bool overlap = false;
};

inline Status ToStatus(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());  // reported here, so clear it for the next caller
  return Internal(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// "kernel NAME (grid, block and shared memory)", for error messages.
std::string Describe(const char* name, const LaunchShape& shape);

// How much shared memory the launches of a kernel may use.
enum class SharedUse {
  kDefault,  // the default limit without opting in: 48 KiB, static and dynamic together
  kAll       // up to the maximum for a block
};

// The host's state of one kernel on every device. Records live as long as the process.
class KernelRecord {
 public:
  KernelRecord(const void* kernel, SharedUse use);
  KernelRecord(const KernelRecord&) = delete;
  KernelRecord& operator=(const KernelRecord&) = delete;

  // Loads the kernel on the current device and sets its attributes, unless this has already been done. *may_overlap:
  // whether its code was compiled for an architecture with the wait that LaunchShape::overlap needs. Thread-safe.
  Status Load(bool* may_overlap);
  // Loads all kernels.
  static Status LoadAll();

 private:
  enum State : int { kUnloaded, kLoaded, kMayOverlap };

  Status LoadOn(int device);

  const void* const kernel_;
  const SharedUse use_;
  KernelRecord* const next_;
  std::atomic<State> states_[kMaxDevices] = {};
};

template <auto kKernel, SharedUse kUse>
inline KernelRecord kernel_record(reinterpret_cast<const void*>(kKernel), kUse);

// Queues the kernel; `name` is used in error messages. Arguments are converted to the kernel's parameters.
template <auto kKernel, SharedUse kUse = SharedUse::kDefault, class... Args>
Status Launch(const char* name, const LaunchShape& shape, Stream stream, Args&&... args) {
  bool may_overlap = false;
  if (Status status = kernel_record<kKernel, kUse>.Load(&may_overlap); !status.ok()) {
    return status.WithMessage(Describe(name, shape) + " could not be loaded: " + status.message());
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.overlap && may_overlap ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) return ToStatus(error, Describe(name, shape) + " could not be launched");
  return {};
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_LAUNCH_CUH_
