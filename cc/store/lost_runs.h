// LostRuns: the runs that a store no longer has, for pools that relied on them. Takes no locks.
#ifndef KVPAGE_STORE_LOST_RUNS_H_
#define KVPAGE_STORE_LOST_RUNS_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "store/directory.h"
#include "store/file_header.h"

namespace kvpage::store {

class LostRuns {
 public:
  // A run without tokens was never usable, so no pool relied on it.
  void Add(Identity identity, StoredRun run) {
    if (run.tokens.empty()) return;
    ++count_;
    tokens_ += static_cast<std::int64_t>(run.tokens.size());
    latest_.emplace_back(std::move(identity), std::move(run));
    for (; tokens_ > kMostTokens; latest_.pop_front()) {
      tokens_ -= static_cast<std::int64_t>(latest_.front().second.tokens.size());
    }
  }
  // Recently lost runs of this shape and fingerprint, since the last call with the same `seen`.
  std::vector<StoredRun> Since(const BlockShape& shape, const std::string& fingerprint, std::int64_t* seen) const {
    std::vector<StoredRun> runs;
    const auto kept = static_cast<std::int64_t>(latest_.size());
    for (std::int64_t i = std::max(kept - (count_ - *seen), std::int64_t{0}); i < kept; ++i) {
      const auto& [identity, run] = latest_[i];
      if (identity.shape == shape && identity.fingerprint == fingerprint) runs.push_back(run);
    }
    *seen = count_;
    return runs;
  }

 private:
  static constexpr std::int64_t kMostTokens = std::int64_t{1} << 20;

  std::deque<std::pair<Identity, StoredRun>> latest_;
  std::int64_t count_ = 0, tokens_ = 0;  // of all lost runs; of those in latest_
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_LOST_RUNS_H_
