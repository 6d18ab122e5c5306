#include <algorithm>
#include <mutex>

#include "kernels/cuda/launch.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kOldestOverlap = 90;  // programmatic dependent launch needs compute capability 9.0, and code for it

KernelRecord* first_record = nullptr;  // linked list; records are added by one thread while the library is loaded

// Allows code to be loaded and attributes to be set while any thread captures a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

std::string Describe(const char* name, const LaunchShape& shape) {
  const auto text = [](const dim3& d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  return std::string("kernel ") + name + " (" + text(shape.grid) + " blocks of " + text(shape.block) + " threads, " +
         std::to_string(shape.shared_bytes) + " bytes of shared memory)";
}

KernelRecord::KernelRecord(const void* kernel, SharedUse use) : kernel_(kernel), use_(use), next_(first_record) {
  first_record = this;
}

Status KernelRecord::Load(bool* may_overlap) {
  int device = 0;
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), "cudaGetDevice"));
  if (device < 0 || device >= kMaxDevices) {
    return FailedPrecondition("CUDA device " + std::to_string(device) + " is beyond the " +
                              std::to_string(kMaxDevices) + " devices that jax_kvpage supports");
  }
  State state = states_[device].load(std::memory_order_acquire);
  if (state == kUnloaded) {
    KVPAGE_RETURN_IF_ERROR(LoadOn(device));
    state = states_[device].load(std::memory_order_relaxed);
  }
  *may_overlap = state == kMayOverlap;
  return {};
}

Status KernelRecord::LoadOn(int device) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (states_[device].load(std::memory_order_relaxed) != kUnloaded) return {};
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes = {};
  KVPAGE_RETURN_IF_ERROR(ToStatus(cudaFuncGetAttributes(&attributes, kernel_), "cudaFuncGetAttributes"));
  if (use_ == SharedUse::kAll) {
    int most = 0;
    KVPAGE_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                    "cudaDeviceGetAttribute"));
    const int bytes = most - static_cast<int>(attributes.sharedSizeBytes);
    KVPAGE_RETURN_IF_ERROR(ToStatus(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                                    "allowing " + std::to_string(bytes) + " bytes of dynamic shared memory"));
    // These kernels need as many concurrent blocks as fit, not a large L1. This is only a hint, so errors are ignored.
    static_cast<void>(cudaFuncSetAttribute(kernel_, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           static_cast<int>(cudaSharedmemCarveoutMaxShared)));
  }
  // Code compiled from PTX for an older architecture does not wait (WaitForPriorKernel), whatever the GPU.
  const bool waits = std::min(attributes.ptxVersion, attributes.binaryVersion) >= kOldestOverlap;
  states_[device].store(waits ? kMayOverlap : kLoaded, std::memory_order_release);
  return {};
}

Status LoadKernels() {
  Status status = KernelRecord::LoadAll();
  if (status.ok()) return status;
  return status.WithMessage("the CUDA kernels could not be loaded: " + status.message() +
                            " (python -m jax_kvpage shows what they were compiled for, and the GPU and driver)");
}

Status KernelRecord::LoadAll() {
  for (KernelRecord* record = first_record; record != nullptr; record = record->next_) {
    bool may_overlap = false;
    KVPAGE_RETURN_IF_ERROR(record->Load(&may_overlap));
  }
  return {};
}

}  // namespace kvpage::cuda
