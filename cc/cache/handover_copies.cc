#include "cache/handover_copies.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "vmm/headroom.h"
#include "vmm/system_error.h"

namespace kvpage::handover {
namespace {

// Zeroes everything after the last token: it is left over from an earlier owner of the memory, or not final.
Status ZeroTail(const Geometry& geometry, const Header& header, const MemoryFile& file) {
  const std::int64_t end = header.blocks * geometry.block_tokens;
  if (header.tokens == end) return {};
  const auto bytes = static_cast<std::size_t>(file.bytes());
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
  if (at == MAP_FAILED) return SystemError("export_blocks: mmap", file.bytes(), errno);
  KVView view = geometry.View(static_cast<char*>(at) + header.begin);
  if (geometry.layout == Layout::kPerLayer) {
    view.kv_stride = header.stride * header.block_bytes;
    view.layer_stride = 2 * view.kv_stride;
  }
  for (std::int64_t token = header.tokens; token < end; ++token) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) geometry.ZeroToken(view, 0, token, layer);
  }
  munmap(at, bytes);
  return {};
}

// A host copy of the last logical block of a slot on a device, [ranges], with zeros after its tokens and in the padding
// after the `payload` bytes of each range.
class LastBlock {
 public:
  static Status Read(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, std::int64_t tokens,
                     LastBlock* out) {
    const Geometry& geometry = pool.table->geometry();
    const std::int64_t logical = tokens / geometry.block_tokens, bytes = geometry.block_bytes;
    out->block_bytes_ = bytes;
    out->bytes_.resize(static_cast<std::size_t>(geometry.num_ranges() * bytes));
    KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).Mover(&out->mover_));
    std::vector<BlockMover::ToHost> copies;
    for (std::int64_t range = 0; range < geometry.num_ranges(); ++range) {
      out->places_.push_back(pool.supply->base() + geometry.Offset(slot, range, logical));
      copies.push_back({out->image(range), out->places_.back()});
    }
    KVPAGE_RETURN_IF_ERROR(out->mover_->Copy(copies, bytes));
    geometry.ZeroTokens(out->bytes_.data(), tokens % geometry.block_tokens);
    return {};
  }
  char* image(std::int64_t range) { return bytes_.data() + range * block_bytes_; }
  // Writes the copy back to the blocks it was read from.
  Status WriteBack() {
    std::vector<BlockMover::ToBlock> copies;
    for (std::size_t i = 0; i < places_.size(); ++i)
      copies.push_back({places_[i], image(static_cast<std::int64_t>(i))});
    return mover_->Copy(copies, block_bytes_);
  }

 private:
  std::int64_t block_bytes_ = 0;
  std::vector<char> bytes_;
  std::vector<char*> places_;
  std::shared_ptr<BlockMover> mover_;
};

}  // namespace

Status CopyToFile(const PoolParts& pool, std::int32_t slot, Handover* handover) {
  const Geometry& geometry = pool.table->geometry();
  const Header& header = handover->header;
  const std::int64_t range_bytes = header.blocks * header.block_bytes;
  KVPAGE_RETURN_IF_ERROR(CheckHeadroom(header.file_bytes()));
  KVPAGE_RETURN_IF_ERROR(MemoryFile::Make(header.file_bytes(), &handover->file));
  for (std::int64_t range = 0; range < header.ranges; ++range) {
    // A range of a slot is one piece of virtual memory, so the kernel copies it in one go.
    const char* const from = pool.supply->base() + geometry.Offset(slot, range, 0);
    KVPAGE_RETURN_IF_ERROR(handover->file->Write(header.Offset(range, 0), from, range_bytes));
  }
  KVPAGE_RETURN_IF_ERROR(ZeroTail(geometry, header, *handover->file));
  KVPAGE_RETURN_IF_ERROR(WriteHeader(header, handover->file.get()));
  return handover->file->Seal();
}

Status CopyToHandles(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, Handover* handover) {
  const Geometry& geometry = pool.table->geometry();
  Arena& arena = pool.supply->arena(mapping);
  const Header& header = handover->header;
  const bool partial = header.tokens % geometry.block_tokens != 0;
  LastBlock last;
  if (partial) KVPAGE_RETURN_IF_ERROR(LastBlock::Read(pool, mapping, slot, header.tokens, &last));
  std::vector<Vmm::CopySource> sources;
  for (std::int64_t range = 0; range < header.ranges; ++range) {
    for (std::int64_t block = 0; block < header.blocks; ++block) {
      const char* const image = partial && block == header.blocks - 1 ? last.image(range) : nullptr;
      sources.push_back({arena.map(slot)[block * header.ranges + range], image});
    }
  }
  // Bytes after the tokens of a block are not part of the sequence and may come from another request.
  const std::int64_t payload = geometry.block_tokens * geometry.token_bytes() / geometry.num_ranges();
  KVPAGE_RETURN_IF_ERROR(arena.ExportCopies(sources, payload, &handover->handles));
  KVPAGE_RETURN_IF_ERROR(MemoryFile::Make(header.file_bytes(), &handover->file));
  KVPAGE_RETURN_IF_ERROR(WriteHeader(header, handover->file.get()));
  return handover->file->Seal();
}

Status ZeroBehind(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, std::int64_t tokens) {
  const Geometry& geometry = pool.table->geometry();
  Arena& arena = pool.supply->arena(mapping);
  if (!arena.shares_handles()) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) arena.ZeroTail(slot, layer, tokens);
    return {};
  }
  if (tokens % geometry.block_tokens == 0) return {};
  LastBlock last;
  KVPAGE_RETURN_IF_ERROR(LastBlock::Read(pool, mapping, slot, tokens, &last));
  return last.WriteBack();
}

Status CopyLast(const PoolParts& pool, const MappingLock& mapping, const Handover& handover,
                const std::vector<std::int32_t>& blocks) {
  Arena& arena = pool.supply->arena(mapping);
  const Header& header = handover.header;
  if (arena.shares_handles()) {
    std::vector<int> descriptors;
    for (std::int64_t range = 0; range < header.ranges; ++range) {
      descriptors.push_back(handover.handles[(range + 1) * header.blocks - 1].get());
    }
    return arena.CopyHandles(descriptors, blocks);
  }
  KVPAGE_RETURN_IF_ERROR(arena.OpenWindow());
  for (std::int64_t range = 0; range < header.ranges; ++range) {
    char* const to = arena.window() + blocks[range] * header.block_bytes;
    KVPAGE_RETURN_IF_ERROR(handover.file->Read(header.Offset(range, header.blocks - 1), to, header.block_bytes));
  }
  return {};
}

}  // namespace kvpage::handover
