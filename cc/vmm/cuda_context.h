// A device's primary context, which XLA and the CUDA runtime also use.
#ifndef KVPAGE_VMM_CUDA_CONTEXT_H_
#define KVPAGE_VMM_CUDA_CONTEXT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "vmm/driver.h"

namespace kvpage {

// Retains the primary context of one device while it exists.
class CudaContext {
 public:
  // `ordinal` counts the devices that CUDA_VISIBLE_DEVICES makes visible, as in JAX.
  static Status Make(const Driver& driver, int ordinal, std::shared_ptr<CudaContext>* out);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  const Driver& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
  cu::Device device() const { return device_; }
  cu::Context get() const { return context_; }

 private:
  CudaContext(const Driver& driver, int ordinal, cu::Device device, cu::Context context)
      : driver_(driver), ordinal_(ordinal), device_(device), context_(context) {}

  const Driver& driver_;
  const int ordinal_;
  const cu::Device device_;
  const cu::Context context_;
};

// Makes the context current on this thread and restores the previous one at its end. Check status() before the first
// driver call.
class ContextScope {
 public:
  explicit ContextScope(const CudaContext& context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  const Status& status() const { return status_; }

 private:
  const Driver& driver_;
  Status status_;
};

// While it exists, this thread may make any call even if it captures a stream: mapping and copying are not work of the
// captured stream.
class UncapturedScope {
 public:
  explicit UncapturedScope(const Driver& driver);
  ~UncapturedScope();
  UncapturedScope(const UncapturedScope&) = delete;
  UncapturedScope& operator=(const UncapturedScope&) = delete;

 private:
  const Driver& driver_;
  cu::CaptureMode mode_ = cu::CaptureMode::kRelaxed;  // inside the scope; afterwards the thread's previous mode
  const bool exchanged_;
};

// Capabilities of a device, for the doctor and for choosing block sizes. Needs no context.
struct DeviceDescription {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  std::int64_t total_bytes = 0;
  bool virtual_memory = false;
  bool posix_handles = false;    // file descriptors can share memory with other processes
  std::int64_t granularity = 0;  // of mappings; 0 without virtual memory management
  std::int64_t recommended_granularity = 0;
};
Status DescribeDevice(const Driver& driver, int ordinal, DeviceDescription* out);
// Free memory of the context's device, for a pool whose capacity is a share of it.
Status FreeDeviceBytes(const CudaContext& context, std::int64_t* out);
Status CountDevices(const Driver& driver, int* count);

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_CONTEXT_H_
