#include "cache/prefix_copies.h"

#include <utility>

#include "cache/prefix_match.h"

namespace kvpage::prefix {

CachedCopies::CachedCopies(std::shared_ptr<PoolAccess> access, std::shared_ptr<BlockMover> mover, const PoolParts& pool,
                           const MappingLock& mapping, std::int32_t space, const std::vector<std::int32_t>& tokens,
                           std::int64_t first_block)
    : access_(std::move(access)),
      mover_(std::move(mover)),
      ranges_(pool.table->geometry().num_ranges()),
      block_bytes_(pool.table->geometry().block_bytes),
      window_(pool.supply->arena(mapping).window()) {
  const std::int64_t block_tokens = pool.table->geometry().block_tokens;
  PrefixIndex::Stretch found = pool.supply->OpenIndex(mapping).FindWhole(
      space, tokens.data(), static_cast<std::int64_t>(tokens.size()), first_block);
  std::size_t written = 0;
  for (; written < found.marks.size(); ++written) {
    const std::int64_t end = (first_block + static_cast<std::int64_t>(written) + 1) * block_tokens;
    if (!Written(pool, pool.table->Lock(), found.owners[written], end)) break;
  }
  marks_.assign(found.marks.begin(), found.marks.begin() + static_cast<std::ptrdiff_t>(written));
  numbers_.assign(found.blocks.begin(), found.blocks.begin() + static_cast<std::ptrdiff_t>(written) * ranges_);
  pool.supply->arena(mapping).StartReading(numbers_);
}

Status CachedCopies::Copy(std::int64_t begin, const std::vector<char*>& to) {
  std::vector<BlockMover::ToHost> copies;
  for (std::size_t i = 0; i < to.size(); ++i) {
    for (std::int64_t range = 0; range < ranges_; ++range) {
      const std::int64_t block = numbers_[(begin + static_cast<std::int64_t>(i)) * ranges_ + range];
      copies.push_back({to[i] + range * block_bytes_, window_ + block * block_bytes_});
    }
  }
  Status status = FailedPrecondition("the pool was closed before its blocks were copied", Reason::kClosed);
  access_->With([&](const PoolParts&) { status = mover_->Copy(copies, block_bytes_); });
  return status;
}

std::int64_t CachedCopies::End() {
  if (good_ >= 0) return good_;
  good_ = 0;
  if (marks_.empty()) return good_;
  access_->With([&](const PoolParts& pool) {
    const MappingLock mapping = pool.supply->Lock();
    pool.supply->arena(mapping).EndReading(numbers_);
    pool.supply->SyncIndex(mapping);  // applies cuts made since
    const PrefixIndex& index = pool.supply->OpenIndex(mapping);
    while (good_ < blocks() && index.Unchanged(marks_[static_cast<std::size_t>(good_)])) ++good_;
  });
  return good_;
}

}  // namespace kvpage::prefix
