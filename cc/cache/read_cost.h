// ReadCost: how long a read of stored blocks takes, from those before it: a part that every read has (a look-up, a file
// to open, a thread to wake) and a part for each byte.
//
// Both are fitted to the latest reads by least squares of relative errors, so that short ones count as much as long
// ones. Reads differ from the fit: some find their bytes in the page cache, and others a busy disk. What is asked for
// is therefore a time that most reads keep.
#ifndef KVPAGE_CACHE_READ_COST_H_
#define KVPAGE_CACHE_READ_COST_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvpage::prefix {

class ReadCost {
 public:
  // A read of this many bytes took some seconds.
  void Add(std::int64_t bytes, double seconds);
  // Seconds in which 9 of 10 reads of this many bytes end; 0: there were no reads.
  double Most(std::int64_t bytes) const;

 private:
  struct Sample {
    double bytes, seconds;
  };
  static constexpr std::size_t kSamples = 32;

  std::vector<Sample> samples_;  // the latest ones, in a ring
  std::size_t next_ = 0;
  // Of the fit.
  double fixed_ = 0, byte_ = 0;  // seconds
  double most_ = 1;              // how much longer than the fit 9 of 10 samples were, at most
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_READ_COST_H_
