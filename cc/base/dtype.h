// Element types that keys, values and queries are stored in.
#ifndef KVPAGE_BASE_DTYPE_H_
#define KVPAGE_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace kvpage {

// The numbers are part of the spec attribute that compiled programs carry: append, never renumber.
enum class DType : std::int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

inline std::size_t ItemSize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
  }
  return "?";
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_DTYPE_H_
