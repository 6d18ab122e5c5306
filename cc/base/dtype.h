// Element types of keys, values and queries. Quantized types are for keys and values only, which have one float32 scale
// per token and KV head by which their elements are multiplied.
#ifndef KVPAGE_BASE_DTYPE_H_
#define KVPAGE_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace kvpage {

// The numbers are part of the spec attribute that compiled programs carry: append, never renumber.
enum class DType : std::int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kF8E4M3 = 4 };

constexpr std::int32_t kNumDTypes = 5;

inline bool IsQuantized(DType dtype) { return dtype == DType::kI8 || dtype == DType::kF8E4M3; }

inline std::size_t ItemSize(DType dtype) { return dtype == DType::kF32 ? 4 : (IsQuantized(dtype) ? 1 : 2); }

// Size in bytes of the scale that belongs to a row of head_dim elements.
inline std::size_t ScaleSize(DType dtype) { return IsQuantized(dtype) ? sizeof(float) : 0; }

inline const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kI8:
      return "int8";
    case DType::kF8E4M3:
      return "float8_e4m3fn";
  }
  return "?";
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_DTYPE_H_
