// Single elements of any dtype, read, written and quantized by plain code that is independent of the kernels.
#ifndef KVPAGE_TESTS_KERNELS_ELEMENTS_H_
#define KVPAGE_TESTS_KERNELS_ELEMENTS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/dtype.h"

namespace kvpage::testing {

// Reads one element of any dtype. Quantized elements are read without their scale.
inline double Read(const char* p, DType dtype) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  if (dtype == DType::kI8) return static_cast<signed char>(*p);
  if (dtype == DType::kF8E4M3) {
    const int code = static_cast<unsigned char>(*p), exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return std::numeric_limits<double>::quiet_NaN();
    const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(mantissa + 8, exponent - 10);
    return code >= 128 ? -size : size;
  }
  std::uint16_t h;
  std::memcpy(&h, p, 2);
  const bool half = dtype == DType::kF16;
  const int exponent_bits = half ? 5 : 8, mantissa_bits = half ? 10 : 7;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = h & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (h & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Rounds to nearest even.
inline void Write(char* p, DType dtype, float x) {
  if (dtype == DType::kF32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const bool half = dtype == DType::kF16;
  const int mantissa_bits = half ? 10 : 7, bias = half ? 15 : 127, max_exponent = half ? 15 : 127;
  std::uint16_t h = std::signbit(x) ? 0x8000 : 0;
  const std::uint16_t infinity = static_cast<std::uint16_t>((2 * bias + 1) << mantissa_bits);
  if (std::isnan(x)) {
    h |= infinity | (1 << (mantissa_bits - 1));
  } else if (std::isinf(x)) {
    h |= infinity;
  } else if (x != 0) {
    int exponent;
    std::frexp(std::fabs(static_cast<double>(x)), &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(x)), mantissa_bits - exponent));
    // The implicit bit carries into the exponent, as does a mantissa that rounds up.
    const long bits = static_cast<long>(units) + (static_cast<long>(exponent + bias - 1) << mantissa_bits);
    h |= exponent > max_exponent || bits > infinity ? infinity : static_cast<std::uint16_t>(bits);
  }
  std::memcpy(p, &h, 2);
}

// Writes a row of n elements in quantized form; returns its scale. The definition is in jax_kvpage/quantize.py.
inline float QuantizeRow(char* p, DType dtype, const float* x, int n) {
  float amax = 0.0f;
  bool finite = true;
  for (int d = 0; d < n; ++d) {
    finite = finite && std::isfinite(x[d]);
    amax = std::max(amax, std::fabs(x[d]));
    p[d] = 0;
  }
  const float scale = amax * (1.0f / (dtype == DType::kI8 ? 127.0f : 448.0f));
  if (!finite) return std::nanf("");
  if (scale < std::numeric_limits<float>::min()) return 0.0f;
  const float inverse = 1.0f / scale;
  for (int d = 0; d < n; ++d) {
    const float y = x[d] * inverse;
    if (dtype == DType::kI8) {
      p[d] = static_cast<char>(std::nearbyint(y));
      continue;
    }
    int exponent;
    std::frexp(y, &exponent);
    exponent = y == 0.0f ? -6 : std::max(exponent - 1, -6);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(static_cast<double>(y)), 3 - exponent)));
    p[d] = static_cast<char>((std::signbit(y) ? 128 : 0) + units + ((exponent + 6) << 3));
  }
  return scale;
}

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_KERNELS_ELEMENTS_H_
