#include "cache/prefix_tier.h"

#include <utility>

#include "cache/prefix_store.h"

namespace kvpage::prefix {

Tier::Tier(const PoolParts& pool, std::shared_ptr<store::PrefixStore> store, double write_ahead,
           const std::shared_ptr<BlockMover>& mover)
    : pool_(pool),
      store_(std::move(store)),
      access_(std::make_shared<PoolAccess>(pool)),
      fetcher_(std::make_shared<Fetcher>(access_, store_.get(), mover)),
      spiller_(
          std::make_shared<Spiller>(access_, store_.get(), StoredShape(pool.table->geometry()), write_ahead, mover)) {
  if (write_ahead <= 0) return;
  const auto wake = [spiller = spiller_] { spiller->Wake(); };
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->OnPressure(mapping, write_ahead, wake);
  pool.table->OnParked(pool.table->Lock(), wake);
}

std::int64_t Tier::Stored(const std::string& space, const std::int32_t* ids, std::int64_t count) const {
  return store_->Find(StoredShape(pool_.table->geometry()), space, ids, count);
}

TierNumbers Tier::Numbers() const {
  TierNumbers numbers;
  {
    const MappingLock mapping = pool_.supply->Lock();
    const Supply::PrefixCounts& counts = pool_.supply->counts(mapping);
    numbers.queries = counts.queries;
    numbers.store_hits = counts.fetched;
    numbers.memory_hits = counts.hits - counts.fetched;
    if (const PrefixIndex* const index = pool_.supply->index(mapping)) {
      numbers.unwritten_evictions = index->numbers().unwritten_evictions;
    }
  }
  numbers.spills = spiller_->numbers();
  numbers.fetches = fetcher_->numbers();
  numbers.read_bytes_per_second = store_->read_bytes_per_second();
  return numbers;
}

Status Tier::Close(const GoOn& go_on) {
  spiller_->Close();
  KVPAGE_RETURN_IF_ERROR(fetcher_->Close(go_on));
  access_->End();
  store_->Leave();
  return {};
}

}  // namespace kvpage::prefix
