// Latencies: statistics of the durations of the latest calls of a kind.
#ifndef KVPAGE_BASE_LATENCIES_H_
#define KVPAGE_BASE_LATENCIES_H_

#include <algorithm>
#include <cstddef>
#include <vector>

namespace kvpage {

// In seconds; 0 if there was no call.
struct LatencyNumbers {
  double median = 0, p95 = 0;  // over the latest calls
};

class Latencies {
 public:
  void Add(double seconds) {
    if (latest_.size() < kLatest) {
      latest_.push_back(seconds);
    } else {
      latest_[next_++ % kLatest] = seconds;
    }
  }
  LatencyNumbers numbers() const {
    if (latest_.empty()) return {};
    std::vector<double> sorted = latest_;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t last = sorted.size() - 1;
    return {sorted[last / 2], sorted[(95 * last + 99) / 100]};
  }

 private:
  static constexpr std::size_t kLatest = 512;

  std::vector<double> latest_;  // ring buffer
  std::size_t next_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_LATENCIES_H_
