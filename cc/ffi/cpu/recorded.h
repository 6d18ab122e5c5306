// Wraps the ops of pools over a mesh, which must never fail their program: see cache/shared_faults.h.
//
// `Recorded<&Handler>::Run` is a handler that calls another one. If that handler fails on such a pool, the error is
// recorded in the pool, and the op returns the cache unchanged, no room, and NaN for computed values.
#ifndef KVPAGE_FFI_CPU_RECORDED_H_
#define KVPAGE_FFI_CPU_RECORDED_H_

#include <cstdint>
#include <cstring>
#include <memory>

#include "ffi/decode.h"

namespace kvpage {

// The cache operands of a handler, which follow the arguments added by XLA.
struct CacheOperands {
  const S32& handle;
  const U32& epoch;
  const S32& lengths;
};
template <class... Rest>
CacheOperands FindCache(const S32& handle, const U32& epoch, const S32& lengths, const Rest&...) {
  return {handle, epoch, lengths};
}
template <class... Rest>
CacheOperands FindCache(const ffi::ThreadPool&, const Rest&... rest) {
  return FindCache(rest...);
}

inline void FindSpec(const SpecAttr& argument, SpecAttr* spec) { *spec = argument; }
template <class T>
void FindSpec(const T&, SpecAttr*) {}

// Whether the pool records an op's error. A program for another spec, or for a pool that is not in this process, fails
// instead, because this happens on all devices.
inline bool KeepError(const ffi::Error& error, const S32& handle, SpecAttr spec) {
  std::shared_ptr<Pool> pool;
  if (!Resolve("", handle, spec, &pool).ok()) return false;
  const auto code = static_cast<Code>(error.errc().value_or(ffi::ErrorCode::kInternal));
  return pool->KeepFault(handle.typed_data()[1], Status(code, error.message()));
}

// Sets a result to the value that an op returns if it does nothing. A result's buffer may alias that of an operand.
inline void Blank(const CacheOperands& cache, ffi::Result<U32>& epoch) {
  std::memmove(epoch->typed_data(), cache.epoch.typed_data(), sizeof(std::uint32_t));
}
inline void Blank(const CacheOperands& cache, ffi::Result<S32>& lengths) {
  std::memmove(lengths->typed_data(), cache.lengths.typed_data(), cache.lengths.size_bytes());
}
inline void Blank(const CacheOperands&, ffi::Result<ffi::Buffer<ffi::PRED>>& ok) {
  std::memset(ok->untyped_data(), 0, ok->size_bytes());
}
// All bits set is a NaN in every floating-point type.
inline void Blank(const CacheOperands&, ffi::Result<F32>& values) {
  std::memset(values->untyped_data(), 0xFF, values->size_bytes());
}
inline void Blank(const CacheOperands&, ffi::Result<Any>& values) {
  std::memset(values->untyped_data(), 0xFF, values->size_bytes());
}
template <class T>
void Blank(const CacheOperands&, const T&) {}  // not a result

template <auto kHandler>
struct Recorded;

template <class... Args, ffi::Error (*kHandler)(Args...)>
struct Recorded<kHandler> {
  static ffi::Error Run(Args... args) {
    ffi::Error error = kHandler(args...);
    if (error.success()) return error;
    SpecAttr spec;
    (FindSpec(args, &spec), ...);
    const CacheOperands cache = FindCache(args...);
    if (!KeepError(error, cache.handle, spec)) return error;
    (Blank(cache, args), ...);
    return ffi::Error::Success();
  }
};

}  // namespace kvpage

#endif  // KVPAGE_FFI_CPU_RECORDED_H_
