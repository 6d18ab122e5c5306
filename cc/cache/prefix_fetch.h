// Fetcher: reads stored blocks into a pool's memory while its other calls continue.
//
// A request claims blocks that nobody can find yet. The store's threads read into them, and the thread that reads the
// last piece adds them to the prefix index. A failed read is a miss: its blocks become free again. Nobody needs to wait
// for a request or to keep its ticket.
#ifndef KVPAGE_CACHE_PREFIX_FETCH_H_
#define KVPAGE_CACHE_PREFIX_FETCH_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/latencies.h"
#include "cache/patience.h"
#include "cache/pool_access.h"
#include "cache/read_cost.h"
#include "store/prefix_store.h"
#include "vmm/block_mover.h"

namespace kvpage::prefix {

// The progress of a request. Thread-safe.
class FetchTicket {
 public:
  // Waits up to `seconds`; returns whether the request is ready.
  bool Wait(double seconds) const;
  // When it is ready: the number of tokens that can be found now and could not be found before, and why not all stored
  // tokens can; empty if they can.
  std::int64_t tokens() const;
  std::string error() const;
  void Finish(std::int64_t tokens, std::string error);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool ready_ = false;
  std::int64_t tokens_ = 0;
  std::string error_;
};

struct FetchRequest {
  std::string space;
  std::vector<std::int32_t> ids;
  double prefill_rate = 0;  // tokens per second that the caller computes; 0: unknown, so read whatever is stored
};

struct FetchNumbers {
  std::int64_t requests = 0;  // requests for which something was read
  std::int64_t tokens = 0;    // added to the index
  std::int64_t bytes = 0;     // size of their keys and values
  double seconds = 0, longest_seconds = 0;
  LatencyNumbers latencies;
  std::map<std::string, std::int64_t> missed;  // stored tokens that were not read, by reason
};

class Fetcher : public std::enable_shared_from_this<Fetcher> {
 public:
  // `mover`: see Spiller.
  Fetcher(std::shared_ptr<PoolAccess> access, store::PrefixStore* store, std::shared_ptr<BlockMover> mover)
      : access_(std::move(access)), store_(*store), mover_(std::move(mover)) {}

  // Begins to read the tokens stored after those in memory.
  Status Start(const PoolParts& pool, const FetchRequest& request, std::shared_ptr<FetchTicket>* out);
  // Cancels reads that have not started and waits for the others; for `go_on` see patience.h.
  Status Close(const GoOn& go_on);
  FetchNumbers numbers() const;

 private:
  struct Order;

  // Sets the destinations of an order's read.
  void SetDestinations(const Geometry& geometry, char* window, const Order& order, store::ReadRequest* read) const;
  // Estimates whether reading the blocks takes less time than computing their tokens. If not, `why` gives the reason.
  bool Worthwhile(double prefill_rate, const store::BlockShape& shape, std::int64_t blocks, std::string* why) const;
  // Returns an order in progress for the first tokens of a sequence, or null.
  std::shared_ptr<FetchTicket> Joined(const std::string& space, const std::int32_t* ids, std::int64_t tokens) const;
  void Finish(const Order& order, std::int64_t good, store::Problem problem);

  const std::shared_ptr<PoolAccess> access_;
  store::PrefixStore& store_;
  const std::shared_ptr<BlockMover> mover_;
  mutable std::mutex mutex_;  // acquired after the mapping mutex
  std::condition_variable ended_;
  std::list<std::shared_ptr<Order>> active_;
  FetchNumbers numbers_;
  Latencies latencies_;
  ReadCost cost_;
  std::int64_t refusals_ = 0;
  bool closed_ = false;
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_FETCH_H_
