// The part of the CUDA driver's binary interface that the cache uses. It is declared here so that a machine without
// CUDA's headers builds and tests every line that calls the driver. If cuda.h is found, cuda_abi.cc checks each number,
// layout, symbol and signature below against it.
#ifndef KVPAGE_VMM_CUDA_ABI_H_
#define KVPAGE_VMM_CUDA_ABI_H_

#include <cstddef>
#include <cstdint>

// The tags of cuda.h, so that a stream here has the same type as in XLA and the CUDA runtime.
struct CUctx_st;
struct CUevent_st;
struct CUstream_st;

namespace kvpage::cu {

using Context = CUctx_st*;
using Event = CUevent_st*;
using Stream = CUstream_st*;
using Device = int;
using DevicePtr = unsigned long long;
using MemHandle = unsigned long long;

// The driver may return other numbers; Driver::Explain asks it for their names.
enum class Result : std::int32_t {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kStubLibrary = 34,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kOperatingSystem = 304,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kNotPermitted = 800,
  kNotSupported = 801,
  kSystemDriverMismatch = 803,
  kStreamCaptureUnsupported = 900,
  kStreamCaptureInvalidated = 901,
  kStreamCaptureIsolation = 905,
  kStreamCaptureImplicit = 906,
  kCapturedEvent = 907,
  kUnknown = 999,
};

enum class Attribute : std::int32_t {
  kMultiprocessorCount = 16,
  kL2CacheBytes = 38,
  kMajor = 75,
  kMinor = 76,
  kMaxSharedBytesPerBlock = 97,  // with opt-in
  kVirtualMemory = 102,
  kPosixHandles = 103,
};

enum class AllocationType : std::int32_t { kPinned = 1 };
enum class LocationType : std::int32_t { kDevice = 1 };
enum class HandleType : std::int32_t { kNone = 0, kPosixFileDescriptor = 1 };
enum class Access : std::int32_t { kNone = 0, kRead = 1, kReadWrite = 3 };
enum class Granularity : std::int32_t { kMinimum = 0, kRecommended = 1 };
enum class CaptureStatus : std::int32_t { kNone = 0, kActive = 1, kInvalidated = 2 };
enum class CaptureMode : std::int32_t { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

inline constexpr unsigned int kStreamNonBlocking = 1;
inline constexpr unsigned int kEventDisableTiming = 2;
inline constexpr unsigned int kHostAllocPortable = 1;
inline constexpr unsigned int kHostAllocDeviceMap = 2;

struct Location {
  LocationType type = LocationType::kDevice;
  int id = 0;
};

struct AllocationProp {
  AllocationType type = AllocationType::kPinned;
  HandleType handle_type = HandleType::kNone;
  Location location;
  void* win32_metadata = nullptr;
  struct {
    unsigned char compression_type = 0;
    unsigned char gpu_direct_rdma_capable = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {};
  } flags;
};

struct AccessDesc {
  Location location;
  Access access = Access::kReadWrite;
};

struct Uuid {
  char bytes[16] = {};
};

}  // namespace kvpage::cu

// Every entry point: our name, the exported symbol, the parameters. All return a Result.
#define KVPAGE_DRIVER_CALLS(X)                                                                                         \
  X(Init, cuInit, (unsigned int flags))                                                                                \
  X(DriverGetVersion, cuDriverGetVersion, (int* version))                                                              \
  X(GetErrorName, cuGetErrorName, (Result result, const char** name))                                                  \
  X(GetErrorString, cuGetErrorString, (Result result, const char** text))                                              \
  X(DeviceGetCount, cuDeviceGetCount, (int* count))                                                                    \
  X(DeviceGet, cuDeviceGet, (Device * device, int ordinal))                                                            \
  X(DeviceGetName, cuDeviceGetName, (char* name, int bytes, Device device))                                            \
  X(DeviceGetAttribute, cuDeviceGetAttribute, (int* value, Attribute attribute, Device device))                        \
  X(DeviceTotalMem, cuDeviceTotalMem_v2, (std::size_t* bytes, Device device))                                          \
  X(DeviceGetUuid, cuDeviceGetUuid_v2, (Uuid * uuid, Device device))                                                   \
  X(PrimaryCtxRetain, cuDevicePrimaryCtxRetain, (Context * context, Device device))                                    \
  X(PrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, (Device device))                                                  \
  X(CtxPushCurrent, cuCtxPushCurrent_v2, (Context context))                                                            \
  X(CtxPopCurrent, cuCtxPopCurrent_v2, (Context * context))                                                            \
  X(MemGetInfo, cuMemGetInfo_v2, (std::size_t* free, std::size_t* total))                                              \
  X(MemGetAllocationGranularity, cuMemGetAllocationGranularity,                                                        \
    (std::size_t* bytes, const AllocationProp* prop, Granularity option))                                              \
  X(MemAddressReserve, cuMemAddressReserve,                                                                            \
    (DevicePtr * address, std::size_t bytes, std::size_t alignment, DevicePtr hint, unsigned long long flags))         \
  X(MemAddressFree, cuMemAddressFree, (DevicePtr address, std::size_t bytes))                                          \
  X(MemCreate, cuMemCreate,                                                                                            \
    (MemHandle * handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags))                     \
  X(MemRelease, cuMemRelease, (MemHandle handle))                                                                      \
  X(MemMap, cuMemMap,                                                                                                  \
    (DevicePtr address, std::size_t bytes, std::size_t offset, MemHandle handle, unsigned long long flags))            \
  X(MemUnmap, cuMemUnmap, (DevicePtr address, std::size_t bytes))                                                      \
  X(MemSetAccess, cuMemSetAccess, (DevicePtr address, std::size_t bytes, const AccessDesc* access, std::size_t count)) \
  X(MemExportToShareableHandle, cuMemExportToShareableHandle,                                                          \
    (void* descriptor, MemHandle handle, HandleType type, unsigned long long flags))                                   \
  X(MemImportFromShareableHandle, cuMemImportFromShareableHandle,                                                      \
    (MemHandle * handle, void* descriptor, HandleType type))                                                           \
  X(MemGetAllocationProperties, cuMemGetAllocationPropertiesFromHandle, (AllocationProp * prop, MemHandle handle))     \
  X(MemAlloc, cuMemAlloc_v2, (DevicePtr * address, std::size_t bytes))                                                 \
  X(MemFree, cuMemFree_v2, (DevicePtr address))                                                                        \
  X(MemHostAlloc, cuMemHostAlloc, (void** host, std::size_t bytes, unsigned int flags))                                \
  X(MemFreeHost, cuMemFreeHost, (void* host))                                                                          \
  X(MemHostGetDevicePointer, cuMemHostGetDevicePointer_v2, (DevicePtr * address, void* host, unsigned int flags))      \
  X(MemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (DevicePtr to, const void* from, std::size_t bytes, Stream stream))         \
  X(MemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void* to, DevicePtr from, std::size_t bytes, Stream stream))               \
  X(MemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (DevicePtr to, DevicePtr from, std::size_t bytes, Stream stream))           \
  X(MemsetD8Async, cuMemsetD8Async, (DevicePtr to, unsigned char byte, std::size_t bytes, Stream stream))              \
  X(StreamCreate, cuStreamCreate, (Stream * stream, unsigned int flags))                                               \
  X(CtxSynchronize, cuCtxSynchronize, ())                                                                              \
  X(StreamSynchronize, cuStreamSynchronize, (Stream stream))                                                           \
  X(StreamIsCapturing, cuStreamIsCapturing, (Stream stream, CaptureStatus * status))                                   \
  X(ThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, (CaptureMode * mode))                          \
  X(StreamGetId, cuStreamGetId, (Stream stream, unsigned long long* id))                                               \
  X(StreamWaitEvent, cuStreamWaitEvent, (Stream stream, Event event, unsigned int flags))                              \
  X(StreamDestroy, cuStreamDestroy_v2, (Stream stream))                                                                \
  X(EventCreate, cuEventCreate, (Event * event, unsigned int flags))                                                   \
  X(EventRecord, cuEventRecord, (Event event, Stream stream))                                                          \
  X(EventQuery, cuEventQuery, (Event event))                                                                           \
  X(EventSynchronize, cuEventSynchronize, (Event event))                                                               \
  X(EventDestroy, cuEventDestroy_v2, (Event event))

#endif  // KVPAGE_VMM_CUDA_ABI_H_
