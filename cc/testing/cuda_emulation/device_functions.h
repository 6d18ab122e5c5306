// CUDA's built-in device functions on the emulated device. Included by cuda_runtime.h.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_DEVICE_FUNCTIONS_H_
#define KVPAGE_TESTING_CUDA_EMULATION_DEVICE_FUNCTIONS_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

// The location of the call, as a default argument.
#define KVPAGE_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers ----
inline void __syncthreads(KVPAGE_SITE) { kvpage::emulation::SyncBlock(0, -1, false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, KVPAGE_SITE) {
  return kvpage::emulation::SyncBlock(0, -1, predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, KVPAGE_SITE) {
  return kvpage::emulation::SyncBlock(0, -1, predicate != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, KVPAGE_SITE) {
  return kvpage::emulation::SyncBlock(0, -1, predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, KVPAGE_SITE) {
  kvpage::emulation::WarpCollective(mask, {"__syncwarp", file, line}, nullptr, [](void* const*, unsigned) {});
}
inline unsigned __activemask() { return 0xffffffffu; }
inline void __nanosleep(unsigned, KVPAGE_SITE) { kvpage::emulation::Yield({"__nanosleep", file, line}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { kvpage::emulation::Fail("__trap()"); }

// ---- warp exchanges ----
namespace kvpage::emulation {

template <class T>
struct Exchange {
  T value;
  int source;  // lane to read
  T result;
};

template <class T>
T ShuffleFrom(unsigned mask, T value, int source, const Site& site) {
  Exchange<T> mine = {value, source, value};
  WarpCollective(mask, site, &mine, [](void* const* args, unsigned mask) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      auto* const to = static_cast<Exchange<T>*>(args[lane]);
      if ((mask >> to->source & 1) == 0) Fail("a shuffle reads a lane that is not in its mask");
      to->result = static_cast<Exchange<T>*>(args[to->source])->value;
    }
  });
  return mine.result;
}

// Returns fold(fold(a, b), c)... over the values of all lanes in the mask.
template <class T, class Fold>
T ReduceWarp(unsigned mask, T value, const Site& site, Fold) {
  WarpCollective(mask, site, &value, [](void* const* args, unsigned mask) {
    T* first = nullptr;
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      auto* const other = static_cast<T*>(args[lane]);
      if (first != nullptr) *first = Fold()(*first, *other);
      if (first == nullptr) first = other;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) != 0) *static_cast<T*>(args[lane]) = *first;
    }
  });
  return value;
}

}  // namespace kvpage::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, KVPAGE_SITE) {
  const int lane = kvpage::emulation::Lane();
  return kvpage::emulation::ShuffleFrom(mask, value, (lane & ~(width - 1)) | (source & (width - 1)),
                                        {"__shfl_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, KVPAGE_SITE) {
  const int lane = kvpage::emulation::Lane(), from = lane ^ lane_mask;
  return kvpage::emulation::ShuffleFrom(mask, value, from / width > lane / width ? lane : from,
                                        {"__shfl_xor_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, KVPAGE_SITE) {
  const int lane = kvpage::emulation::Lane(), from = lane - static_cast<int>(delta);
  return kvpage::emulation::ShuffleFrom(mask, value, from < (lane & ~(width - 1)) ? lane : from,
                                        {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, KVPAGE_SITE) {
  const int lane = kvpage::emulation::Lane(), from = lane + static_cast<int>(delta);
  return kvpage::emulation::ShuffleFrom(mask, value, from > (lane | (width - 1)) ? lane : from,
                                        {"__shfl_down_sync", file, line});
}

namespace kvpage::emulation {
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
}  // namespace kvpage::emulation

inline unsigned __ballot_sync(unsigned mask, int predicate, KVPAGE_SITE) {
  return kvpage::emulation::ReduceWarp(mask, predicate != 0 ? 1u << kvpage::emulation::Lane() : 0u,
                                       {"__ballot_sync", file, line}, kvpage::emulation::Or());
}
inline int __any_sync(unsigned mask, int predicate, KVPAGE_SITE) {
  return kvpage::emulation::ReduceWarp(mask, predicate != 0 ? 1 : 0, {"__any_sync", file, line},
                                       kvpage::emulation::Or());
}
inline int __all_sync(unsigned mask, int predicate, KVPAGE_SITE) {
  return kvpage::emulation::ReduceWarp(mask, predicate != 0 ? 1 : 0, {"__all_sync", file, line},
                                       kvpage::emulation::And());
}
#define KVPAGE_REDUCE(name, type, Fold)                                                                \
  inline type name(unsigned mask, type value, KVPAGE_SITE) {                                           \
    return kvpage::emulation::ReduceWarp(mask, value, {#name, file, line}, kvpage::emulation::Fold()); \
  }
KVPAGE_REDUCE(__reduce_add_sync, unsigned, Add)
KVPAGE_REDUCE(__reduce_add_sync, int, Add)
KVPAGE_REDUCE(__reduce_max_sync, unsigned, Max)
KVPAGE_REDUCE(__reduce_max_sync, int, Max)
KVPAGE_REDUCE(__reduce_min_sync, unsigned, Min)
KVPAGE_REDUCE(__reduce_min_sync, int, Min)
KVPAGE_REDUCE(__reduce_or_sync, unsigned, Or)
KVPAGE_REDUCE(__reduce_and_sync, unsigned, And)
#undef KVPAGE_REDUCE

// ---- atomics: one thread runs at a time ----
#define KVPAGE_ATOMIC(name, expression)             \
  template <class T>                                \
  T name(T* address, std::common_type_t<T> value) { \
    const T old = *address;                         \
    *address = expression;                          \
    return old;                                     \
  }
KVPAGE_ATOMIC(atomicAdd, old + value)
KVPAGE_ATOMIC(atomicSub, old - value)
KVPAGE_ATOMIC(atomicExch, value)
KVPAGE_ATOMIC(atomicMax, old > value ? old : value)
KVPAGE_ATOMIC(atomicMin, old < value ? old : value)
KVPAGE_ATOMIC(atomicOr, old | value)
KVPAGE_ATOMIC(atomicAnd, old& value)
KVPAGE_ATOMIC(atomicXor, old ^ value)
#undef KVPAGE_ATOMIC
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

// ---- loads and stores with hints ----
#define KVPAGE_LOAD(name) \
  template <class T>      \
  T name(const T* p) {    \
    return *p;            \
  }
#define KVPAGE_STORE(name)                       \
  template <class T>                             \
  void name(T* p, std::common_type_t<T> value) { \
    *p = value;                                  \
  }
KVPAGE_LOAD(__ldg)
KVPAGE_LOAD(__ldca)
KVPAGE_LOAD(__ldcg)
KVPAGE_LOAD(__ldcs)
KVPAGE_LOAD(__ldcv)
KVPAGE_LOAD(__ldlu)
KVPAGE_STORE(__stwb)
KVPAGE_STORE(__stcg)
KVPAGE_STORE(__stcs)
KVPAGE_STORE(__stwt)
#undef KVPAGE_LOAD
#undef KVPAGE_STORE

// ---- bits ----
namespace kvpage::emulation {
template <class To, class From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace kvpage::emulation
inline int __float_as_int(float x) { return kvpage::emulation::BitCast<int>(x); }
inline unsigned __float_as_uint(float x) { return kvpage::emulation::BitCast<unsigned>(x); }
inline float __int_as_float(int x) { return kvpage::emulation::BitCast<float>(x); }
inline float __uint_as_float(unsigned x) { return kvpage::emulation::BitCast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = bytes >> ((selector >> 4 * i & 7) * 8) & 0xff;
    result |= ((selector >> 4 * i & 8) != 0 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}

// ---- arithmetic ----
// glibc itself declares names like __expf.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, (x))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf((x), (y))
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// Volatile, so that the compiler does not fuse them with surrounding operations.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) {
  volatile float sum = x + y;
  return sum;
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
inline int __float2int_rn(float x) {
  if (!(x >= -0x1p31f)) return x < 0 ? INT32_MIN : 0;  // NaN is 0
  return x < 0x1p31f ? static_cast<int>(std::nearbyint(x)) : INT32_MAX;
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define KVPAGE_MIN_MAX(type)                                \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
KVPAGE_MIN_MAX(int)
KVPAGE_MIN_MAX(unsigned)
KVPAGE_MIN_MAX(long)
KVPAGE_MIN_MAX(unsigned long)
KVPAGE_MIN_MAX(long long)
KVPAGE_MIN_MAX(unsigned long long)
#undef KVPAGE_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

#endif  // KVPAGE_TESTING_CUDA_EMULATION_DEVICE_FUNCTIONS_H_
