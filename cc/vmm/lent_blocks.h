// LentBlocks: which blocks of a pool belong to a sequence's file (memory_file.h), and at which offset.
#ifndef KVPAGE_VMM_LENT_BLOCKS_H_
#define KVPAGE_VMM_LENT_BLOCKS_H_

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "vmm/memory_file.h"

namespace kvpage {

class LentBlocks {
 public:
  struct Place {
    std::shared_ptr<MemoryFile> file;
    std::int64_t offset = 0;
  };

  bool empty() const { return places_.empty(); }
  void Add(std::int32_t block, std::shared_ptr<MemoryFile> file, std::int64_t offset) {
    ++counts_[file.get()];
    places_[block] = {std::move(file), offset};
  }
  // Returns the previous place; its file is null if there was none.
  Place Remove(std::int32_t block) {
    const auto found = places_.find(block);
    if (found == places_.end()) return {};
    Place place = std::move(found->second);
    places_.erase(found);
    if (const auto count = counts_.find(place.file.get()); --count->second == 0) counts_.erase(count);
    return place;
  }
  // Returns null if the block is in no file.
  const Place* Find(std::int32_t block) const {
    const auto found = places_.find(block);
    return found != places_.end() ? &found->second : nullptr;
  }
  // Returns -1 if the block is not in this file.
  std::int64_t Offset(const MemoryFile& file, std::int32_t block) const {
    const Place* const place = Find(block);
    return place != nullptr && place->file.get() == &file ? place->offset : -1;
  }
  std::int64_t Count(const MemoryFile& file) const {
    const auto found = counts_.find(&file);
    return found != counts_.end() ? found->second : 0;
  }
  std::vector<std::int32_t> BlocksOf(const MemoryFile& file) const {
    std::vector<std::int32_t> blocks;
    for (const auto& [block, place] : places_) {
      if (place.file.get() == &file) blocks.push_back(block);
    }
    return blocks;
  }
  const std::unordered_map<std::int32_t, Place>& places() const { return places_; }
  const std::unordered_map<const MemoryFile*, std::int64_t>& counts() const { return counts_; }

 private:
  std::unordered_map<std::int32_t, Place> places_;
  std::unordered_map<const MemoryFile*, std::int64_t> counts_;  // number of blocks per file
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_LENT_BLOCKS_H_
