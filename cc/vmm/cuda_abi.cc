// Compile-time checks of cuda_abi.h against CUDA's header, if it is found.
#include "vmm/cuda_abi.h"

#if __has_include(<cuda.h>)
#include <cuda.h>

#include <type_traits>

namespace kvpage::cu {
namespace {

// Compares one argument in both declarations: same size and same kind of register.
template <class Ours, class Theirs>
constexpr bool SameArgument() {
  return sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
         std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;
}

template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class... Ours, class... Theirs>
struct SameCall<Result (*)(Ours...), CUresult (*)(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
      return (SameArgument<Ours, Theirs>() && ...);
    } else {
      return false;
    }
  }();
};

#define KVPAGE_CHECK_CALL(name, symbol, args) \
  static_assert(SameCall<Result(*) args, decltype(&::symbol)>::value, #symbol " is declared otherwise in cuda.h");
KVPAGE_DRIVER_CALLS(KVPAGE_CHECK_CALL)
#undef KVPAGE_CHECK_CALL

#define KVPAGE_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs))
static_assert(sizeof(Result) == sizeof(CUresult));
KVPAGE_SAME(Result::kSuccess, CUDA_SUCCESS);
KVPAGE_SAME(Result::kInvalidValue, CUDA_ERROR_INVALID_VALUE);
KVPAGE_SAME(Result::kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
KVPAGE_SAME(Result::kNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
KVPAGE_SAME(Result::kDeinitialized, CUDA_ERROR_DEINITIALIZED);
KVPAGE_SAME(Result::kStubLibrary, CUDA_ERROR_STUB_LIBRARY);
KVPAGE_SAME(Result::kNoDevice, CUDA_ERROR_NO_DEVICE);
KVPAGE_SAME(Result::kInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
KVPAGE_SAME(Result::kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
KVPAGE_SAME(Result::kOperatingSystem, CUDA_ERROR_OPERATING_SYSTEM);
KVPAGE_SAME(Result::kInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
KVPAGE_SAME(Result::kNotReady, CUDA_ERROR_NOT_READY);
KVPAGE_SAME(Result::kIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
KVPAGE_SAME(Result::kNotPermitted, CUDA_ERROR_NOT_PERMITTED);
KVPAGE_SAME(Result::kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
KVPAGE_SAME(Result::kSystemDriverMismatch, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
KVPAGE_SAME(Result::kStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
KVPAGE_SAME(Result::kStreamCaptureInvalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
KVPAGE_SAME(Result::kStreamCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
KVPAGE_SAME(Result::kStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
KVPAGE_SAME(Result::kCapturedEvent, CUDA_ERROR_CAPTURED_EVENT);
KVPAGE_SAME(Result::kUnknown, CUDA_ERROR_UNKNOWN);

KVPAGE_SAME(Attribute::kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
KVPAGE_SAME(Attribute::kL2CacheBytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
KVPAGE_SAME(Attribute::kMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
KVPAGE_SAME(Attribute::kMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
KVPAGE_SAME(Attribute::kMaxSharedBytesPerBlock, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
KVPAGE_SAME(Attribute::kVirtualMemory, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
KVPAGE_SAME(Attribute::kPosixHandles, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);

KVPAGE_SAME(AllocationType::kPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
KVPAGE_SAME(LocationType::kDevice, CU_MEM_LOCATION_TYPE_DEVICE);
KVPAGE_SAME(HandleType::kNone, CU_MEM_HANDLE_TYPE_NONE);
KVPAGE_SAME(HandleType::kPosixFileDescriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
KVPAGE_SAME(Access::kNone, CU_MEM_ACCESS_FLAGS_PROT_NONE);
KVPAGE_SAME(Access::kRead, CU_MEM_ACCESS_FLAGS_PROT_READ);
KVPAGE_SAME(Access::kReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
KVPAGE_SAME(Granularity::kMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
KVPAGE_SAME(Granularity::kRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
KVPAGE_SAME(CaptureStatus::kNone, CU_STREAM_CAPTURE_STATUS_NONE);
KVPAGE_SAME(CaptureStatus::kActive, CU_STREAM_CAPTURE_STATUS_ACTIVE);
KVPAGE_SAME(CaptureStatus::kInvalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
KVPAGE_SAME(CaptureMode::kGlobal, CU_STREAM_CAPTURE_MODE_GLOBAL);
KVPAGE_SAME(CaptureMode::kThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
KVPAGE_SAME(CaptureMode::kRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
KVPAGE_SAME(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
KVPAGE_SAME(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
KVPAGE_SAME(kHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE);
KVPAGE_SAME(kHostAllocDeviceMap, CU_MEMHOSTALLOC_DEVICEMAP);

static_assert(std::is_same_v<Context, CUcontext> && std::is_same_v<Stream, CUstream> && std::is_same_v<Event, CUevent>);
static_assert(std::is_same_v<Device, CUdevice> && std::is_same_v<DevicePtr, CUdeviceptr>);
static_assert(std::is_same_v<MemHandle, CUmemGenericAllocationHandle>);

#define KVPAGE_SAME_FIELD(Ours, our_field, Theirs, their_field)               \
  static_assert(offsetof(Ours, our_field) == offsetof(Theirs, their_field) && \
                sizeof(Ours::our_field) == sizeof(Theirs::their_field))
static_assert(sizeof(Location) == sizeof(CUmemLocation));
KVPAGE_SAME_FIELD(Location, type, CUmemLocation, type);
KVPAGE_SAME_FIELD(Location, id, CUmemLocation, id);
static_assert(sizeof(AllocationProp) == sizeof(CUmemAllocationProp));
KVPAGE_SAME_FIELD(AllocationProp, type, CUmemAllocationProp, type);
KVPAGE_SAME_FIELD(AllocationProp, handle_type, CUmemAllocationProp, requestedHandleTypes);
KVPAGE_SAME_FIELD(AllocationProp, location, CUmemAllocationProp, location);
KVPAGE_SAME_FIELD(AllocationProp, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
KVPAGE_SAME_FIELD(AllocationProp, flags, CUmemAllocationProp, allocFlags);
static_assert(sizeof(AccessDesc) == sizeof(CUmemAccessDesc));
KVPAGE_SAME_FIELD(AccessDesc, location, CUmemAccessDesc, location);
KVPAGE_SAME_FIELD(AccessDesc, access, CUmemAccessDesc, flags);
static_assert(sizeof(Uuid) == sizeof(CUuuid));
KVPAGE_SAME_FIELD(Uuid, bytes, CUuuid, bytes);

}  // namespace
}  // namespace kvpage::cu
#endif
