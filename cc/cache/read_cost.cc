#include "cache/read_cost.h"

#include <algorithm>

namespace kvpage::prefix {
namespace {

constexpr double kShare = 0.9;  // of the reads take at most the predicted time

}  // namespace

void ReadCost::Add(std::int64_t bytes, double seconds) {
  if (bytes <= 0 || seconds <= 0) return;
  const Sample sample = {static_cast<double>(bytes), seconds};
  if (samples_.size() < kSamples) {
    samples_.push_back(sample);
  } else {
    samples_[next_++ % kSamples] = sample;
  }
  // Minimizes the squares of (fixed + byte * bytes) / seconds - 1.
  double ones = 0, slopes = 0, both = 0, one = 0, slope = 0;
  for (const Sample& each : samples_) {
    const double x = 1 / each.seconds, y = each.bytes / each.seconds;
    ones += x * x;
    slopes += y * y;
    both += x * y;
    one += x;
    slope += y;
  }
  const double determinant = ones * slopes - both * both;
  // Reads of a single size do not separate the two parts: then everything is attributed to bytes, which overestimates
  // longer reads.
  const bool known = determinant > 1e-6 * ones * slopes;
  fixed_ = known ? (one * slopes - slope * both) / determinant : 0;
  byte_ = known ? (slope * ones - one * both) / determinant : slope / slopes;
  if (fixed_ < 0) fixed_ = 0, byte_ = slope / slopes;
  if (byte_ < 0) fixed_ = one / ones, byte_ = 0;
  std::vector<double> ratios;
  for (const Sample& each : samples_) ratios.push_back(each.seconds / (fixed_ + byte_ * each.bytes));
  const auto place = ratios.begin() + static_cast<std::ptrdiff_t>(kShare * static_cast<double>(ratios.size()));
  std::nth_element(ratios.begin(), place, ratios.end());
  most_ = std::max(1.0, *place);
}

double ReadCost::Most(std::int64_t bytes) const { return most_ * (fixed_ + byte_ * static_cast<double>(bytes)); }

}  // namespace kvpage::prefix
