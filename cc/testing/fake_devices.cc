// The fake driver's devices, contexts and error names.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "testing/fake_impl.h"

namespace kvpage {
namespace {

thread_local std::vector<cu::Context> t_contexts;  // pushed by this thread

}  // namespace

int FakeDriver::Impl::CurrentDevice() const {
  if (t_contexts.empty()) return -1;
  for (const PrimaryContext& context : contexts) {
    if (reinterpret_cast<const void*>(&context) == t_contexts.back() && context.retains > 0) return context.device;
  }
  return -1;
}

cu::Result FakeDriver::Impl::CheckDevice(const std::string& call, int device) {
  const int current = CurrentDevice();
  if (device < 0 || device == current) return cu::Result::kSuccess;
  return Violation(
      call + " for device " + std::to_string(device) + " in the context of device " + std::to_string(current),
      cu::Result::kInvalidContext);
}

namespace cu::fake {

Result Init(unsigned int flags) {
  KVPAGE_ENTRY(Init, Nothing);
  if (flags != 0) return entry->Violation("cuInit: flags must be 0");
  entry->initialized = true;
  return Result::kSuccess;
}

Result DriverGetVersion(int* version) {
  KVPAGE_ENTRY(DriverGetVersion, Nothing);
  *version = 13000;
  return Result::kSuccess;
}

// Names of the codes that the fake driver returns; the real driver knows all codes.
Result GetErrorName(Result result, const char** name) {
  switch (result) {
#define KVPAGE_RESULT(value, text) \
  case Result::value:              \
    *name = text;                  \
    return Result::kSuccess
    KVPAGE_RESULT(kSuccess, "CUDA_SUCCESS");
    KVPAGE_RESULT(kInvalidValue, "CUDA_ERROR_INVALID_VALUE");
    KVPAGE_RESULT(kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY");
    KVPAGE_RESULT(kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED");
    KVPAGE_RESULT(kDeinitialized, "CUDA_ERROR_DEINITIALIZED");
    KVPAGE_RESULT(kNoDevice, "CUDA_ERROR_NO_DEVICE");
    KVPAGE_RESULT(kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE");
    KVPAGE_RESULT(kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT");
    KVPAGE_RESULT(kOperatingSystem, "CUDA_ERROR_OPERATING_SYSTEM");
    KVPAGE_RESULT(kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE");
    KVPAGE_RESULT(kNotReady, "CUDA_ERROR_NOT_READY");
    KVPAGE_RESULT(kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS");
    KVPAGE_RESULT(kNotPermitted, "CUDA_ERROR_NOT_PERMITTED");
    KVPAGE_RESULT(kNotSupported, "CUDA_ERROR_NOT_SUPPORTED");
    KVPAGE_RESULT(kStreamCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
    KVPAGE_RESULT(kStreamCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED");
    KVPAGE_RESULT(kStreamCaptureIsolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION");
    KVPAGE_RESULT(kStreamCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT");
    KVPAGE_RESULT(kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT");
    KVPAGE_RESULT(kUnknown, "CUDA_ERROR_UNKNOWN");
#undef KVPAGE_RESULT
    default:
      *name = nullptr;
      return Result::kInvalidValue;
  }
}

Result GetErrorString(Result result, const char** text) {
  *text = result == Result::kOutOfMemory ? "out of memory" : "as the fake driver was told";
  return Result::kSuccess;
}

Result DeviceGetCount(int* count) {
  KVPAGE_ENTRY(DeviceGetCount, Init);
  *count = entry->options.devices;
  return Result::kSuccess;
}

Result DeviceGet(Device* device, int ordinal) {
  KVPAGE_ENTRY(DeviceGet, Init);
  if (ordinal < 0 || ordinal >= entry->options.devices) {
    return entry->Violation("cuDeviceGet: no such ordinal", Result::kInvalidDevice);
  }
  *device = ordinal;
  return Result::kSuccess;
}

Result DeviceGetName(char* name, int bytes, Device device) {
  KVPAGE_ENTRY(DeviceGetName, Init);
  std::snprintf(name, static_cast<std::size_t>(bytes), "fake GPU %d", device);
  return Result::kSuccess;
}

Result DeviceGetAttribute(int* value, Attribute attribute, Device device) {
  KVPAGE_ENTRY(DeviceGetAttribute, Init);
  if (device < 0 || device >= entry->options.devices) {
    return entry->Violation("cuDeviceGetAttribute: no such device", Result::kInvalidDevice);
  }
  switch (attribute) {  // the default values are those of an H100
    case Attribute::kMultiprocessorCount:
      *value = 132;
      break;
    case Attribute::kL2CacheBytes:
      *value = 50 << 20;
      break;
    case Attribute::kMajor:
      *value = 9;
      break;
    case Attribute::kMinor:
      *value = 0;
      break;
    case Attribute::kMaxSharedBytesPerBlock:
      *value = 227 << 10;
      break;
    case Attribute::kVirtualMemory:
      *value = entry->options.virtual_memory;
      break;
    case Attribute::kPosixHandles:
      *value = entry->options.posix_handles;
      break;
    default:
      return entry->Violation("cuDeviceGetAttribute: not one that the fake driver knows");
  }
  return Result::kSuccess;
}

Result DeviceTotalMem(std::size_t* bytes, Device device) {
  KVPAGE_ENTRY(DeviceTotalMem, Init);
  if (device < 0 || device >= entry->options.devices) {
    return entry->Violation("cuDeviceTotalMem: no such device", Result::kInvalidDevice);
  }
  *bytes = static_cast<std::size_t>(entry->options.device_bytes);
  return Result::kSuccess;
}

Result DeviceGetUuid(Uuid* uuid, Device device) {
  KVPAGE_ENTRY(DeviceGetUuid, Init);
  if (device < 0 || device >= entry->options.devices) {
    return entry->Violation("cuDeviceGetUuid: no such device", Result::kInvalidDevice);
  }
  // The same in every process, like the UUID of a real device.
  static constexpr char kBegin[sizeof(uuid->bytes)] = "fake GPU";
  std::copy(std::begin(kBegin), std::end(kBegin), uuid->bytes);
  uuid->bytes[sizeof(uuid->bytes) - 1] = static_cast<char>(device);
  return Result::kSuccess;
}

Result PrimaryCtxRetain(Context* context, Device device) {
  KVPAGE_ENTRY(PrimaryCtxRetain, Init);
  if (device < 0 || device >= entry->options.devices) {
    return entry->Violation("cuDevicePrimaryCtxRetain: no such device", Result::kInvalidDevice);
  }
  ++entry->contexts[device].retains;
  *context = reinterpret_cast<Context>(&entry->contexts[device]);
  return Result::kSuccess;
}

Result PrimaryCtxRelease(Device device) {
  KVPAGE_ENTRY(PrimaryCtxRelease, Init);
  if (device < 0 || device >= entry->options.devices || entry->contexts[device].retains == 0) {
    return entry->Violation("cuDevicePrimaryCtxRelease of what was not retained", Result::kInvalidContext);
  }
  --entry->contexts[device].retains;
  return Result::kSuccess;
}

Result CtxPushCurrent(Context context) {
  KVPAGE_ENTRY(CtxPushCurrent, Init);
  const auto& all = entry->contexts;
  if (std::none_of(all.begin(), all.end(), [&](const FakeDriver::Impl::PrimaryContext& c) {
        return reinterpret_cast<const void*>(&c) == context && c.retains > 0;
      })) {
    return entry->Violation("cuCtxPushCurrent of a context that does not live", Result::kInvalidContext);
  }
  t_contexts.push_back(context);
  ++entry->pushed;
  return Result::kSuccess;
}

Result CtxPopCurrent(Context* context) {
  KVPAGE_ENTRY(CtxPopCurrent, Init);
  if (t_contexts.empty()) return entry->Violation("cuCtxPopCurrent of nothing", Result::kInvalidContext);
  *context = t_contexts.back();
  t_contexts.pop_back();
  --entry->pushed;
  return Result::kSuccess;
}

}  // namespace cu::fake
}  // namespace kvpage
