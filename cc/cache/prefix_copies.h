// CachedCopies: how a thread of a store copies blocks of a cached sequence that the host cannot read, through the mover
// of the device.
//
// Such copies take a while. No lock is held meanwhile, and no reference either: memory that somebody wants is evicted
// and given away as if nobody read it. The end shows which blocks were the sequence's throughout; the others do not
// count. Meanwhile their memory is not given back to the system (Arena::StartReading).
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
  // Of the whole blocks of a sequence from `first_block` on, up to its end: those that are in memory and written. The
  // index is up to date.
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
  std::vector<std::int32_t> numbers_;          // of the blocks, [blocks, ranges]
  std::vector<PrefixIndex::EntryMark> marks_;  // [blocks]
  std::int64_t good_ = -1;                     // -1: the copies have not ended
};

}  // namespace kvpage::prefix

#endif  // KVPAGE_CACHE_PREFIX_COPIES_H_
