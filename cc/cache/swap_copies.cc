#include "cache/swap_copies.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cache/prefix_store.h"

namespace kvpage::swapping {
namespace {

using MoverPtr = std::shared_ptr<BlockMover>;

// Reads the blocks of a swap as bytes for the store, with zeros after the last token.
class BlockCopier {
 public:
  BlockCopier(const Geometry& geometry, const char* window, SwapPtr swap, MoverPtr mover)
      : geometry_(geometry),
        window_(window),
        swap_(std::move(swap)),
        mover_(std::move(mover)),
        blocks_(swap_->blocks),
        begin_(swap_->kept),
        tokens_(static_cast<std::int64_t>(swap_->ids.size())) {}

  const std::shared_ptr<const Status> failure() const { return failure_; }

  bool operator()(std::int64_t begin, std::int64_t count, char* to) const {
    const std::int64_t ranges = geometry_.num_ranges(), bytes = geometry_.block_bytes;
    const std::lock_guard<std::mutex> lock(swap_->copy_mutex);
    if (swap_->copies_stopped) return false;
    std::vector<BlockMover::ToHost> copies;
    for (std::int64_t i = 0; i < count * ranges; ++i) {
      const std::int32_t block = blocks_[(begin_ + begin) * ranges + i];
      copies.push_back({to + i * bytes, window_ + block * bytes});
    }
    if (mover_ != nullptr) {
      *failure_ = mover_->Copy(copies, bytes);
      if (!failure_->ok()) return false;
    } else {
      for (const BlockMover::ToHost& copy : copies) std::memcpy(copy.host, copy.block, bytes);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t first = (begin_ + begin + i) * geometry_.block_tokens;
      geometry_.ZeroTokens(to + i * ranges * bytes, std::max<std::int64_t>(tokens_ - first, 0));
    }
    return true;
  }

 private:
  const Geometry geometry_;
  const char* const window_;
  const SwapPtr swap_;
  const MoverPtr mover_;
  const std::vector<std::int32_t> blocks_;
  const std::int64_t begin_, tokens_;
  const std::shared_ptr<Status> failure_ = std::make_shared<Status>();
};

}  // namespace

Status DescribeWrite(Arena* arena, const SwapPtr& swap, store::SwapWrite* write) {
  MoverPtr mover;
  KVPAGE_RETURN_IF_ERROR(arena->Mover(&mover));
  const Geometry& geometry = arena->geometry();
  write->shape = prefix::StoredShape(geometry);
  write->blocks = static_cast<std::int64_t>(swap->blocks.size()) / write->shape.ranges - swap->kept;
  const BlockCopier copier(geometry, arena->window(), swap, mover);
  write->failure = copier.failure();
  write->copy = copier;
  if (mover == nullptr) return {};
  write->make_buffer = [mover](std::int64_t bytes, store::HostBuffer* out) { return mover->MakeBuffer(bytes, out); };
  return {};
}

Status DescribeRead(Arena* arena, const SwapPtr& swap, store::SwapRead* read) {
  MoverPtr mover;
  KVPAGE_RETURN_IF_ERROR(arena->Mover(&mover));
  const Geometry& geometry = arena->geometry();
  const std::int64_t ranges = geometry.num_ranges(), bytes = geometry.block_bytes;
  std::vector<char*> destinations;
  for (auto block = swap->blocks.begin() + swap->kept * ranges; block != swap->blocks.end(); ++block) {
    destinations.push_back(arena->window() + *block * bytes);
  }
  read->image = swap->image;
  if (mover == nullptr) {
    read->destinations = std::move(destinations);
    return {};
  }
  read->place = [mover, ranges, bytes, to = std::move(destinations)](std::int64_t begin, std::int64_t count,
                                                                     const char* from) {
    std::vector<BlockMover::ToBlock> copies;
    for (std::int64_t i = 0; i < count * ranges; ++i) copies.push_back({to[begin * ranges + i], from + i * bytes});
    return mover->Copy(copies, bytes);
  };
  return {};
}

}  // namespace kvpage::swapping
