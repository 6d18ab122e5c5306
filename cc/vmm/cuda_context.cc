#include "vmm/cuda_context.h"

#include <string>

namespace kvpage {
namespace {

std::string OfDevice(int ordinal) { return "of device " + std::to_string(ordinal); }

Status FindDevice(const Driver& driver, int ordinal, cu::Device* device) {
  int count = 0;
  KVPAGE_RETURN_IF_ERROR(CountDevices(driver, &count));
  if (ordinal < 0 || ordinal >= count) {
    return InvalidArgument("CUDA device " + std::to_string(ordinal) + " does not exist: " + std::to_string(count) +
                           " are visible (CUDA_VISIBLE_DEVICES)");
  }
  KVPAGE_CU(driver, DeviceGet, OfDevice(ordinal), device, ordinal);
  return {};
}

}  // namespace

Status CountDevices(const Driver& driver, int* count) {
  KVPAGE_CU(driver, DeviceGetCount, "", count);
  return {};
}

Status CudaContext::Make(const Driver& driver, int ordinal, std::shared_ptr<CudaContext>* out) {
  cu::Device device = 0;
  KVPAGE_RETURN_IF_ERROR(FindDevice(driver, ordinal, &device));
  cu::Context context = nullptr;
  KVPAGE_CU(driver, PrimaryCtxRetain, OfDevice(ordinal), &context, device);
  out->reset(new CudaContext(driver, ordinal, device, context));
  return {};
}

CudaContext::~CudaContext() { static_cast<void>(driver_.PrimaryCtxRelease(device_)); }

ContextScope::ContextScope(const CudaContext& context) : driver_(context.driver()) {
  if (const cu::Result result = driver_.CtxPushCurrent(context.get()); result != cu::Result::kSuccess) {
    status_ = driver_.Explain(result, cu::Call::kCtxPushCurrent, OfDevice(context.ordinal()));
  }
}

ContextScope::~ContextScope() {
  cu::Context popped = nullptr;
  if (status_.ok()) static_cast<void>(driver_.CtxPopCurrent(&popped));
}

UncapturedScope::UncapturedScope(const Driver& driver)
    : driver_(driver), exchanged_(driver.ThreadExchangeStreamCaptureMode(&mode_) == cu::Result::kSuccess) {}

UncapturedScope::~UncapturedScope() {
  if (exchanged_) static_cast<void>(driver_.ThreadExchangeStreamCaptureMode(&mode_));
}

Status FreeDeviceBytes(const CudaContext& context, std::int64_t* out) {
  const ContextScope scope(context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  std::size_t free = 0, total = 0;
  KVPAGE_CU(context.driver(), MemGetInfo, OfDevice(context.ordinal()), &free, &total);
  *out = static_cast<std::int64_t>(free);
  return {};
}

Status DescribeDevice(const Driver& driver, int ordinal, DeviceDescription* out) {
  *out = {};
  cu::Device device = 0;
  KVPAGE_RETURN_IF_ERROR(FindDevice(driver, ordinal, &device));
  const std::string what = OfDevice(ordinal);
  char name[256] = "";
  KVPAGE_CU(driver, DeviceGetName, what, name, sizeof(name) - 1, device);
  out->name = name;
  std::size_t total = 0;
  KVPAGE_CU(driver, DeviceTotalMem, what, &total, device);
  out->total_bytes = static_cast<std::int64_t>(total);
  int virtual_memory = 0, posix_handles = 0;
  KVPAGE_CU(driver, DeviceGetAttribute, what, &out->major, cu::Attribute::kMajor, device);
  KVPAGE_CU(driver, DeviceGetAttribute, what, &out->minor, cu::Attribute::kMinor, device);
  KVPAGE_CU(driver, DeviceGetAttribute, what, &out->multiprocessors, cu::Attribute::kMultiprocessorCount, device);
  KVPAGE_CU(driver, DeviceGetAttribute, what, &virtual_memory, cu::Attribute::kVirtualMemory, device);
  KVPAGE_CU(driver, DeviceGetAttribute, what, &posix_handles, cu::Attribute::kPosixHandles, device);
  out->virtual_memory = virtual_memory != 0;
  out->posix_handles = posix_handles != 0;
  if (!out->virtual_memory) return {};
  cu::AllocationProp prop;
  prop.location.id = device;
  std::size_t minimum = 0, recommended = 0;
  KVPAGE_CU(driver, MemGetAllocationGranularity, what, &minimum, &prop, cu::Granularity::kMinimum);
  KVPAGE_CU(driver, MemGetAllocationGranularity, what, &recommended, &prop, cu::Granularity::kRecommended);
  out->granularity = static_cast<std::int64_t>(minimum);
  out->recommended_granularity = static_cast<std::int64_t>(recommended);
  return {};
}

}  // namespace kvpage
