#include "vmm/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace kvpage {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

// Describes, per call, why memory ran out and what to do about it.
std::string Advice(const Driver& driver, cu::Call call) {
  switch (call) {
    case cu::Call::kMemAddressReserve:
      return ": the address space of the device is used up; use fewer slots or a smaller max_seq_len";
    case cu::Call::kMemHostAlloc:
      return ": this is pinned host memory; the machine, the container or `ulimit -l` has no more";
    default:
      break;
  }
  std::string text;
  std::size_t free = 0, total = 0;
  const bool in_context = call != cu::Call::kPrimaryCtxRetain && call != cu::Call::kCtxPushCurrent;
  if (in_context && driver.MemGetInfo(&free, &total) == cu::Result::kSuccess) {
    text = ": the device has " + std::to_string(free) + " bytes free of " + std::to_string(total);
  }
  return text +
         "; JAX itself takes 75% of a GPU's memory when it starts: leave room for the cache with "
         "XLA_PYTHON_CLIENT_MEM_FRACTION (0.4, say) or XLA_PYTHON_CLIENT_PREALLOCATE=false, set before jax is "
         "imported, or give the pool less capacity";
}

Code CodeOf(cu::Result result) {
  switch (result) {
    case cu::Result::kOutOfMemory:
      return Code::kResourceExhausted;
    case cu::Result::kInvalidDevice:
      return Code::kInvalidArgument;
    case cu::Result::kNotInitialized:
    case cu::Result::kDeinitialized:
    case cu::Result::kStubLibrary:
    case cu::Result::kNoDevice:
    case cu::Result::kNotPermitted:
    case cu::Result::kNotSupported:
    case cu::Result::kSystemDriverMismatch:
      return Code::kFailedPrecondition;
    default:
      return Code::kInternal;
  }
}

}  // namespace

namespace cu {

const char* Symbol(Call call) {
  static constexpr const char* kSymbols[] = {
#define KVPAGE_NAME(name, symbol, args) #symbol,
      KVPAGE_DRIVER_CALLS(KVPAGE_NAME)
#undef KVPAGE_NAME
  };
  return call < Call::kCount ? kSymbols[static_cast<int>(call)] : "?";
}

}  // namespace cu

Status Driver::Explain(cu::Result result, cu::Call call, const std::string& what) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (GetErrorName(result, &name) != cu::Result::kSuccess) name = nullptr;
  if (GetErrorString(result, &text) != cu::Result::kSuccess) text = nullptr;
  std::string message = cu::Symbol(call);
  if (!what.empty()) message += " " + what;
  message += " failed with " + std::string(name != nullptr ? name : "an unknown code") + " (" +
             std::to_string(static_cast<int>(result)) + (text != nullptr ? std::string(", ") + text : "") + ")";
  if (result == cu::Result::kOutOfMemory) message += Advice(*this, call);
  // Virtual addresses and pinned host memory do not use GPU memory.
  const bool of_card = call != cu::Call::kMemAddressReserve && call != cu::Call::kMemHostAlloc;
  const bool full = result == cu::Result::kOutOfMemory && of_card;
  return {CodeOf(result), std::move(message), full ? Reason::kOutOfDeviceMemory : Reason::kNone};
}

Status OpenDriverLibrary(const std::string& library, Driver* out) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* error = dlerror();
    return FailedPrecondition("no CUDA driver: " + library + " could not be opened (" +
                              (error != nullptr ? error : "no reason given") +
                              "); install NVIDIA's driver, start the container with its GPUs (--gpus all), or use a "
                              "CPU device");
  }
  std::string missing;
#define KVPAGE_LOAD(name, symbol, args)                                      \
  out->name = reinterpret_cast<decltype(out->name)>(dlsym(handle, #symbol)); \
  if (out->name == nullptr) missing += missing.empty() ? #symbol : ", " #symbol;
  KVPAGE_DRIVER_CALLS(KVPAGE_LOAD)
#undef KVPAGE_LOAD
  if (!missing.empty()) {
    dlclose(handle);
    *out = {};
    return FailedPrecondition("the CUDA driver in " + library + " lacks " + missing +
                              ": a newer driver is wanted (CUDA 12 or later)");
  }
  // From here on the library stays loaded, because handles into it have no bounded lifetime.
  if (const cu::Result result = out->Init(0); result != cu::Result::kSuccess) {
    Status status = out->Explain(result, cu::Call::kInit, "");
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return {status.code(), status.message() + "; CUDA_VISIBLE_DEVICES is " +
                               (visible != nullptr ? "\"" + std::string(visible) + "\"" : "not set") +
                               ": `nvidia-smi` should list a device, and the driver and its kernel module be of one "
                               "version"};
  }
  return {};
}

Status Driver::Open(const Driver** out) {
  struct Opened {
    Driver driver;
    Status status;
  };
  // Never destroyed: pools may be destroyed later than statics.
  static const Opened* const opened = [] {
    auto* o = new Opened;
    o->status = OpenDriverLibrary(kLibrary, &o->driver);
    return o;
  }();
  if (opened->status.ok()) *out = &opened->driver;
  return opened->status;
}

}  // namespace kvpage
