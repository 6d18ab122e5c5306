// Replaces CUDA's header of the same name: kernels that are compiled as C++ against it run on the emulated device
// (emulator.h). Has only what the project's kernels use.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_CUDA_RUNTIME_H_
#define KVPAGE_TESTING_CUDA_EMULATION_CUDA_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "testing/cuda_emulation/emulator.h"
#include "testing/cuda_emulation/vector_types.h"

#ifndef KVPAGE_EMULATED
#error "compile with -DKVPAGE_EMULATED: the kernels choose their emulated twins by it"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- host API ----
using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes = 0;
  int maxDynamicSharedSizeBytes = 0;
  int ptxVersion = 0, binaryVersion = 0;
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed = 0;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id = cudaLaunchAttributeProgrammaticStreamSerialization;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace kvpage::emulation {
// Runs or captures a kernel.
cudaError_t Queue(const KernelLaunch& launch);
// Replaces all aligned words of these bytes that look like pointers, so that accesses through them fault.
void HidePointers(void* bytes, std::size_t size);
}  // namespace kvpage::emulation

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  kvpage::emulation::KernelLaunch launch;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  launch.shared_bytes = config->dynamicSmemBytes;
  // Every thread gets a copy, as every thread on a device has its own view of the parameters.
  std::tuple<Params...> params(static_cast<Params>(args)...);
  launch.body = [kernel, params] { std::apply(kernel, params); };
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    launch.overlap |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                      config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  if (launch.overlap) {
    kvpage::emulation::HidePointers(&params, sizeof(params));
    launch.early = [kernel, params] { std::apply(kernel, params); };
  }
  return kvpage::emulation::Queue(launch);
}

template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Params...), int threads,
                                                          std::size_t shared_bytes) {
  const std::size_t by_shared = shared_bytes > 0 ? std::size_t{228 << 10} / (shared_bytes + 1024) : 32;
  const std::size_t by_threads = 2048 / static_cast<std::size_t>(threads);
  *blocks = static_cast<int>(by_shared < by_threads ? by_shared : by_threads);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

#include "testing/cuda_emulation/device_functions.h"

#endif  // KVPAGE_TESTING_CUDA_EMULATION_CUDA_RUNTIME_H_
