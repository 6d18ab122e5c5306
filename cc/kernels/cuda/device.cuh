// The base of every CUDA kernel of the project: launches with error messages, shared memory, the number of
// multiprocessors.
//
// Kernel files are compiled twice: by nvcc, and as C++ (KVPAGE_EMULATED) against stand-ins for CUDA's headers, to be
// tested on machines without a GPU. Differences between the languages are handled by the macros here: no <<<>>>, no
// __shared__ outside KVPAGE_SHARED, no inline PTX without an emulated version.
#ifndef KVPAGE_KERNELS_CUDA_DEVICE_CUH_
#define KVPAGE_KERNELS_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "base/status.h"
#include "kernels/cuda/kernels.h"

namespace kvpage::cuda {

template <class T>
struct Identity {
  using Type = T;
};

}  // namespace kvpage::cuda

// KVPAGE_SHARED(float[4][32], sums): a __shared__ variable of that type, as a statement in a kernel.
// KVPAGE_DYNAMIC_SHARED(smem): the dynamic shared memory of the launch, an unsigned char array aligned to 1024 bytes.
#ifdef KVPAGE_EMULATED
#define KVPAGE_SHARED(type, name)                           \
  static ::kvpage::emulation::Shared<type> name##_storage_; \
  ::kvpage::cuda::Identity<type>::Type& name = name##_storage_.get()
#define KVPAGE_DYNAMIC_SHARED(name) unsigned char* const name = ::kvpage::emulation::DynamicShared()
#else
#define KVPAGE_SHARED(type, name) __shared__::kvpage::cuda::Identity<type>::Type name
#define KVPAGE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace kvpage::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
// Dynamic shared memory that a kernel can have without opting in to more.
inline constexpr std::size_t kDefaultSharedBytes = 48 << 10;

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  // The kernel may start while the previous one on the stream still runs (programmatic dependent launch): every thread
  // must call WaitForPriorKernel() before it accesses memory that the previous kernel uses. Only after a kernel of the
  // same op: kernels that XLA queues do not wait.
  bool overlap = false;
};

inline std::string Describe(const char* name, const LaunchShape& shape) {
  const auto text = [](const dim3& d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  return std::string("kernel ") + name + " (" + text(shape.grid) + " blocks of " + text(shape.block) + " threads, " +
         std::to_string(shape.shared_bytes) + " bytes of shared memory)";
}

inline Status ToStatus(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());  // reported here, so clear it for the next caller
  return Internal(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Queues the kernel; `name` is for messages. Arguments convert to the kernel's parameters.
template <class... Params, class... Args>
Status Launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape, Stream stream, Args&&... args) {
  if (shape.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return ToStatus(error, Describe(name, shape) + " cannot have that much shared memory");
    // Such kernels need as many concurrent blocks as fit, not a large L1. This is a hint: its result is ignored.
    static_cast<void>(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           static_cast<int>(cudaSharedmemCarveoutMaxShared)));
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
  config.numAttrs = shape.overlap ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) return ToStatus(error, Describe(name, shape) + " could not be launched");
  return {};
}

// Multiprocessors of the current device.
inline Status NumSms(int* out) {
  int device = 0;
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "cudaGetDevice"));
  return ToStatus(cudaDeviceGetAttribute(out, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
}

// See LaunchShape::overlap. The compiler may move __ldg and const __restrict__ loads before this wait: use plain loads
// for memory that the prior kernel wrote.
__device__ __forceinline__ void WaitForPriorKernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start early. It still waits for the end of this one.
__device__ __forceinline__ void LetNextKernelStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__host__ __device__ constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DEVICE_CUH_
