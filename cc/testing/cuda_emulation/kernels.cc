#include "testing/cuda_emulation/kernels.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

namespace kvpage::emulation {
namespace {

struct KernelState {
  bool loaded = false;
  int max_dynamic_shared_bytes = (48 << 10) - kStaticSharedBytes;
};

struct Kernels {
  std::mutex mutex;
  std::map<const void*, KernelState> states;
  Graph* capturing = nullptr;
  int loads_in_capture = 0;
};

Kernels& TheKernels() {
  static auto* const kernels = new Kernels;
  return *kernels;
}

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// Returns the kernel's state, with its code loaded. The caller must hold the mutex.
KernelState* Find(Kernels* kernels, const void* kernel) {
  KernelState* const state = &kernels->states[kernel];
  if (state->loaded) return state;
  if (kernels->capturing != nullptr) {
    if (capture_mode != cudaStreamCaptureModeRelaxed) Fail("a capture is open, and a kernel's code is not loaded yet");
    ++kernels->loads_in_capture;
  }
  state->loaded = true;
  return state;
}

cudaError_t Check(const KernelLaunch& launch, const KernelState& state) {
  const Index3 &grid = launch.grid, &block = launch.block;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = static_cast<std::size_t>(state.max_dynamic_shared_bytes);
  return launch.shared_bytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void Graph::Begin() {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  if (kernels.capturing != nullptr) Fail("a capture is open already");
  kernels.capturing = this;
}

void Graph::End() {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  kernels.capturing = nullptr;
}

cudaError_t Graph::Instantiate() const {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  for (const KernelLaunch& launch : launches_) {
    if (const cudaError_t error = Check(launch, kernels.states[launch.kernel]); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void Graph::Launch() const {
  for (const KernelLaunch& launch : launches_) Run({&launch});
}

void Graph::LaunchTogether(const Graph& a, const Graph& b) {
  for (std::size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
    std::vector<const KernelLaunch*> together;
    for (const Graph* graph : {&a, &b}) {
      if (i < graph->size()) together.push_back(&graph->launches_[i]);
    }
    Run(together);
  }
}

int NumLoadsInCapture() {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  return kernels.loads_in_capture;
}

cudaError_t Queue(const KernelLaunch& launch) {
  Kernels& kernels = TheKernels();
  {
    const std::lock_guard<std::mutex> lock(kernels.mutex);
    const cudaError_t error = Check(launch, *Find(&kernels, launch.kernel));
    if (error != cudaSuccess) return error;
    if (kernels.capturing != nullptr) {
      kernels.capturing->launches_.push_back(launch);
      return cudaSuccess;
    }
  }
  Run({&launch});
  return cudaSuccess;
}

void HidePointers(void* bytes, std::size_t size) {
  constexpr std::uint64_t kNowhere = std::uint64_t{1} << 55;  // no address in a program has this bit set
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  auto* const data = static_cast<unsigned char*>(bytes);
  for (std::size_t at = 0; at + sizeof(void*) <= size; at += sizeof(void*)) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, sizeof(word));
    unsigned char resident = 0;
    const bool is_pointer =
        word >= page && word < kNowhere && mincore(reinterpret_cast<void*>(word / page * page), page, &resident) == 0;
    if (!is_pointer) continue;
    word |= kNowhere;
    std::memcpy(data + at, &word, sizeof(word));
  }
}

}  // namespace kvpage::emulation

using kvpage::emulation::device;
using kvpage::emulation::Find;
using kvpage::emulation::KernelState;
using kvpage::emulation::kStaticSharedBytes;
using kvpage::emulation::TheKernels;

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  KernelState* const state = Find(&kernels, kernel);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value + kStaticSharedBytes > device().shared_bytes_per_block) return cudaErrorInvalidValue;
  state->max_dynamic_shared_bytes = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  auto& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  const KernelState* const state = Find(&kernels, kernel);
  attributes->sharedSizeBytes = kStaticSharedBytes;
  attributes->maxDynamicSharedSizeBytes = state->max_dynamic_shared_bytes;
  attributes->ptxVersion = device().code_version;
  attributes->binaryVersion = 10 * device().major + device().minor;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, kvpage::emulation::capture_mode);
  return cudaSuccess;
}
