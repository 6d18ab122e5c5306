// The base of every CUDA kernel of the project: launches (launch.cuh), shared memory, waiting for the prior kernel, and
// the number of multiprocessors.
//
// Kernel files are compiled twice: by nvcc, and as C++ (KVPAGE_EMULATED) against stand-ins for CUDA's headers, so that
// they can be tested on machines without a GPU. The macros here hide the differences between the languages: no <<<>>>,
// no __shared__ outside KVPAGE_SHARED, no inline PTX without an emulated version.
#ifndef KVPAGE_KERNELS_CUDA_DEVICE_CUH_
#define KVPAGE_KERNELS_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"

namespace kvpage::cuda {

template <class T>
struct Identity {
  using Type = T;
};

}  // namespace kvpage::cuda

// KVPAGE_SHARED(float[4][32], sums): a __shared__ variable of that type, declared as a statement in a kernel.
// KVPAGE_DYNAMIC_SHARED(smem): the dynamic shared memory of the launch, as an unsigned char array aligned to 1024
// bytes.
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

// The number of multiprocessors of the current device.
inline Status NumSms(int* out) {
  int device = 0;
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "cudaGetDevice"));
  return ToStatus(cudaDeviceGetAttribute(out, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
}

// See LaunchShape::overlap. The compiler may move __ldg and const __restrict__ loads before this wait, so use plain
// loads for memory that the prior kernel wrote.
__device__ __forceinline__ void WaitForPriorKernel() {
#ifdef KVPAGE_EMULATED
  emulation::WaitForPriorKernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start early. It still waits for this one to end.
__device__ __forceinline__ void LetNextKernelStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__host__ __device__ constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_DEVICE_CUH_
