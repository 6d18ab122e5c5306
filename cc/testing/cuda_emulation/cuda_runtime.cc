#include "testing/cuda_emulation/cuda_runtime.h"

#include <cstring>
#include <map>

namespace kvpage::emulation {
namespace {

std::map<const void*, int>& SharedLimits() {
  static auto* const limits = new std::map<const void*, int>;
  return *limits;
}

}  // namespace

cudaError_t CheckLaunch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = SharedLimits().find(kernel);
  const std::size_t allowed = limit != SharedLimits().end() ? static_cast<std::size_t>(limit->second) : 48 << 10;
  return config.dynamicSmemBytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t SetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device().shared_bytes_per_block) return cudaErrorInvalidValue;
  SharedLimits()[kernel] = value;
  return cudaSuccess;
}

}  // namespace kvpage::emulation

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const kvpage::emulation::Device& device = kvpage::emulation::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.num_sms;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes_per_block + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes_per_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
  }
  return "?";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "?";
}
