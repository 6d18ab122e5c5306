// CachedCopies: lets a store thread copy blocks of a cached sequence that the host cannot read, through the device's
// mover.
//
// Such copies take a while. They hold neither a lock nor a reference: needed memory is evicted and reused as if nobody
// read it. End() then determines which leading blocks held the sequence throughout; the others are discarded. Until
// then the memory is not returned to the system (Arena::StartReading).
#ifndef KVPAGE_CACHE_PREFIX_COPIES_H_
#define KVPAGE_CACHE_PREFIX_COPIES_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cache/pool_access.h"
#include "cache/prefix_index.h"
#include "store/prefix_store.h"
#include "vmm/block_mover.h"

namespace kvpage::prefix {

class CachedCopies final : public store::BlockCopier {
 public:
  // Selects, of the sequence's full blocks from `first_block` on, those that are in memory and written. The index must
  // be up to date.
  CachedCopies(std::shared_ptr<PoolAccess> access, std::shared_ptr<BlockMover> mover, const PoolParts& pool,
               const MappingLock& mapping, std::int32_t space, const std::vector<std::int32_t>& tokens,
               std::int64_t first_block);
  ~CachedCopies() override { End(); }
  CachedCopies(const CachedCopies&) = delete;
  CachedCopies& operator=(const CachedCopies&) = delete;

  std::int64_t blocks() const override { return static_cast<std::int64_t>(marks_.size()); }
  Status Copy(std::int64_t begin, const std::vector<char*>& to) override;
  std::int64_t End() override;
  Status MakeBuffer(std::int64_t bytes, store::HostBuffer* out) override { return mover_->MakeBuffer(bytes, out); }

 private:
  const std::shared_ptr<PoolAccess> access_;
  const std::shared_ptr<BlockMover> mover_;
  const std::int64_t ranges_, block_bytes_;
  const char* const window_;
  std::vector<std::int32_t> numbers_;          // block numbers, [blocks, ranges]
  std::vector<PrefixIndex::EntryMark> marks_;  // [blocks]
  std::int64_t good_ = -1;                     // -1: End() has not been called yet
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_COPIES_H_
