// Tier: the store below a pool's memory. Blocks are written to it before they are evicted (prefix_spill.h), and read
// back from it (prefix_fetch.h).
#ifndef KVPAGE_CACHE_PREFIX_TIER_H_
#define KVPAGE_CACHE_PREFIX_TIER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache/prefix_fetch.h"
#include "cache/prefix_spill.h"

namespace kvpage::prefix {

// Totals since the pool was created.
struct TierNumbers {
  std::int64_t queries = 0;      // tokens that requests asked for by id
  std::int64_t memory_hits = 0;  // of these, tokens found in memory that were computed there
  std::int64_t store_hits = 0;   // of these, tokens found in memory that were read from the store
  SpillNumbers spills;
  std::int64_t unwritten_evictions = 0;  // full blocks evicted before they were written
  FetchNumbers fetches;
  double read_bytes_per_second = 0;  // read throughput of the store
};

class Tier {
 public:
  // `write_ahead`: fraction of the pool's blocks that should be free or written; 0 disables writing ahead. `mover`:
  // copies blocks to host memory and back; null if the host can access them directly.
  Tier(const PoolParts& pool, std::shared_ptr<store::PrefixStore> store, double write_ahead,
       const std::shared_ptr<BlockMover>& mover);
  ~Tier() { static_cast<void>(Close({})); }

  // Number of leading tokens, in full blocks, that are in the store. Does not access the disk.
  std::int64_t Stored(const std::string& space, const std::int32_t* ids, std::int64_t count) const;
  Status Prefetch(const FetchRequest& request, std::shared_ptr<FetchTicket>* out) {
    return fetcher_->Start(pool_, request, out);
  }
  TierNumbers Numbers() const;
  // Afterwards no thread of the store touches the pool. Safe to call again.
  Status Close(const GoOn& go_on);

 private:
  const PoolParts& pool_;
  const std::shared_ptr<store::PrefixStore> store_;
  const std::shared_ptr<PoolAccess> access_;
  const std::shared_ptr<Fetcher> fetcher_;
  const std::shared_ptr<Spiller> spiller_;
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_TIER_H_
