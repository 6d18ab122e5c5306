// ReadCost: predicts how long a read of stored blocks takes from earlier reads: a fixed part (a lookup, opening a file,
// waking a thread) plus a part per byte.
//
// Both are fitted to the latest reads by least squares of relative errors, so that short reads count as much as long
// ones. Reads differ from the fit: some find their bytes in the page cache, others a busy disk. So the prediction is a
// time within which most reads finish.
#ifndef KVPAGE_CACHE_READ_COST_H_
#define KVPAGE_CACHE_READ_COST_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvpage::prefix {

class ReadCost {
 public:
  // Records a read of this many bytes.
  void Add(std::int64_t bytes, double seconds);
  // The time in seconds within which 9 of 10 reads of this size finish; 0 if there were no reads.
  double Most(std::int64_t bytes) const;

 private:
  struct Sample {
    double bytes, seconds;
  };
  static constexpr std::size_t kSamples = 32;

  std::vector<Sample> samples_;  // the latest ones, a ring buffer
  std::size_t next_ = 0;
  // Results of the fit.
  double fixed_ = 0, byte_ = 0;  // seconds
  double most_ = 1;              // factor by which 9 of 10 samples exceed the fit at most
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_READ_COST_H_
