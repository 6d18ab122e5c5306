#include "cache/block_table.h"

#include <algorithm>

namespace kvpage {

void BlockTable::Append(std::int64_t slot, const std::vector<std::int32_t>& blocks) {
  const std::int64_t more = static_cast<std::int64_t>(blocks.size()) / num_ranges_;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::int32_t>& row = rows_[slot];
  for (std::int64_t i = 0; i < more; ++i) {
    for (std::int64_t range = 0; range < num_ranges_; ++range) row.push_back(blocks[range * more + i]);
  }
}

void BlockTable::Truncate(std::int64_t slot, std::int64_t blocks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::int32_t>& row = rows_[slot];
  row.resize(blocks * num_ranges_);
  if (row.size() <= row.capacity() / 4) row.shrink_to_fit();
}

void BlockTable::AppendFrom(std::int64_t slot, std::int64_t from, std::int64_t begin) {
  const std::lock_guard<std::mutex> lock(mutex_);
  rows_[slot].insert(rows_[slot].end(), rows_[from].begin() + begin * num_ranges_, rows_[from].end());
}

void BlockTable::Assign(std::int64_t slot, const std::int32_t* map, std::int64_t blocks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  rows_[slot].assign(map, map + blocks * num_ranges_);
}

void BlockTable::Drop(std::int64_t slot, std::int64_t blocks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fill_n(rows_[slot].begin(), blocks * num_ranges_, -1);
}

void BlockTable::Replace(std::int64_t slot, std::int64_t logical, std::int64_t range, std::int32_t block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  rows_[slot][logical * num_ranges_ + range] = block;
}

bool BlockTable::Copy(std::int64_t slot, std::int64_t range, std::int64_t count, std::int32_t* out) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<std::int32_t>& row = rows_[slot];
  if (count * num_ranges_ > static_cast<std::int64_t>(row.size())) return false;
  const std::int32_t* from = row.data() + range;
  for (std::int64_t i = 0; i < count; ++i, from += num_ranges_) out[i] = *from;
  return true;
}

}  // namespace kvpage
