// Cosine and sine of an angle, with the same arithmetic on CPU and on a device (whose library would use a table).
#ifndef KVPAGE_BASE_COSINE_H_
#define KVPAGE_BASE_COSINE_H_

#include <cmath>
#include <cstdint>

#include "base/host_device.h"

namespace kvpage {

struct CosineAndSine {
  float cosine;
  float sine;
};

// Accurate to about the last place of a float for angles of up to 1e9: a distance in tokens times radians per token.
KVPAGE_HOST_DEVICE inline CosineAndSine CosineAndSineOf(double angle) {
  constexpr double kTwoOverPi = 0.63661977236758134308, kHalfPi = 1.57079632679489661923,
                   kHalfPiRest = 6.123233995736766e-17;  // pi / 2 minus kHalfPi
  const double quarters = rint(angle * kTwoOverPi);
  const double x = (angle - quarters * kHalfPi) - quarters * kHalfPiRest;  // within pi / 4
  // Taylor series; the first omitted terms are below 1e-15.
  const double y = x * x;
  double cosine = 1.0, sine = 1.0;
  for (int n = 16; n > 0; n -= 2) {
    cosine = 1.0 - y / (n * (n - 1)) * cosine;
    sine = 1.0 - y / (n * (n + 1)) * sine;
  }
  sine *= x;
  const auto quarter = static_cast<std::int64_t>(quarters) & 3;
  const double c = quarter % 2 == 0 ? cosine : sine, s = quarter % 2 == 0 ? sine : cosine;
  return {static_cast<float>(quarter == 1 || quarter == 2 ? -c : c), static_cast<float>(quarter >= 2 ? -s : s)};
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_COSINE_H_
