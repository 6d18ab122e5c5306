#include "cache/shared_runs.h"

#include <algorithm>

namespace kvpage {

void SharedRuns::Set(std::int64_t slot, const std::int32_t* map, std::int64_t stride, std::int64_t count) {
  std::vector<std::int32_t>& blocks = runs_[slot].blocks;
  const auto begin = static_cast<std::int64_t>(blocks.size());
  if (begin >= count) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (begin == 0) size_.fetch_add(1, std::memory_order_relaxed);
    if (begin == 0) blocks.reserve(count);
    for (std::int64_t i = begin; i < count; ++i) blocks.push_back(map[i * stride]);
  }
  if (mirror_ == nullptr) return;
  // If it fails, programs read shared memory once for each slot.
  static_cast<void>(mirror_->ExtendRun(static_cast<std::int32_t>(slot), begin, blocks.data() + begin, count - begin));
}

Status SharedRuns::Cut(std::int64_t slot, std::int64_t blocks) {
  Run& run = runs_[slot];
  if (static_cast<std::int64_t>(run.blocks.size()) <= blocks) return {};
  if (mirror_ != nullptr) KVPAGE_RETURN_IF_ERROR(mirror_->CutRun(static_cast<std::int32_t>(slot), blocks));
  const std::lock_guard<std::mutex> lock(mutex_);
  run.cut_at = ++cuts_;
  run.blocks.resize(blocks);
  if (blocks > 0) return {};
  run.blocks.shrink_to_fit();
  size_.fetch_sub(1, std::memory_order_relaxed);
  return {};
}

void SharedRuns::Replace(std::int64_t logical, std::int32_t from, std::int32_t to) {
  if (size_.load(std::memory_order_relaxed) == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Run& run : runs_) {
    if (logical < static_cast<std::int64_t>(run.blocks.size()) && run.blocks[logical] == from) run.blocks[logical] = to;
  }
}

std::uint64_t SharedRuns::Find(const std::vector<Sequence>& sequences, SharedPrefixes* out) const {
  out->Clear();
  if (sequences.size() < 2 || size_.load(std::memory_order_relaxed) < 2) return 0;
  std::vector<BlockRun> runs;
  runs.reserve(sequences.size());
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Sequence& sequence : sequences) {
    const std::vector<std::int32_t>& blocks = runs_[sequence.slot].blocks;
    runs.push_back({blocks.data(), static_cast<std::int64_t>(blocks.size())});
  }
  FindSharedPrefixes(runs, block_tokens_, out);
  return cuts_;
}

bool SharedRuns::Changed(const std::vector<Sequence>& sequences, std::uint64_t since) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(sequences.begin(), sequences.end(),
                     [&](const Sequence& sequence) { return runs_[sequence.slot].cut_at > since; });
}

}  // namespace kvpage
