// BlockTable: the physical block of each logical block of every range and slot. The arena writes it, with the page
// table; kernels that address blocks by number (addressing="table") get copies of its rows.
//
// One thread at a time writes, under supply's mapping mutex, which also guards reading a slot's row in place. Handlers
// copy rows while they hold the state mutex, and mapping memory would keep them waiting for the other one: the table's
// own mutex, the last in the order of locks, is held only while a few numbers are written or copied.
#ifndef KVPAGE_CACHE_BLOCK_TABLE_H_
#define KVPAGE_CACHE_BLOCK_TABLE_H_

#include <cstdint>
#include <mutex>
#include <vector>

namespace kvpage {

class BlockTable {
 public:
  BlockTable(std::int64_t num_slots, std::int64_t num_ranges) : num_ranges_(num_ranges), rows_(num_slots) {}

  // ---- under the mapping mutex ----
  // [logical blocks, ranges] of a slot, so that a slot without blocks has no memory here and its row grows and shrinks
  // at its end.
  const std::vector<std::int32_t>& operator[](std::int64_t slot) const { return rows_[slot]; }
  // Appends logical blocks: of each range in turn, `blocks.size() / num_ranges` blocks.
  void Append(std::int64_t slot, const std::vector<std::int32_t>& blocks);
  // Drops what is beyond `blocks` logical blocks.
  void Truncate(std::int64_t slot, std::int64_t blocks);
  // Appends the logical blocks of another slot from `begin` on.
  void AppendFrom(std::int64_t slot, std::int64_t from, std::int64_t begin);
  // A slot without blocks gets these, [blocks, ranges]; they may be those of another slot.
  void Assign(std::int64_t slot, const std::int32_t* map, std::int64_t blocks);
  // The first `blocks` logical blocks are no longer mapped: -1.
  void Drop(std::int64_t slot, std::int64_t blocks);
  void Replace(std::int64_t slot, std::int64_t logical, std::int64_t range, std::int32_t block);

  // ---- from any thread ----
  // Copies the first `count` blocks of a range, -1 for dropped ones; false when the slot has fewer.
  bool Copy(std::int64_t slot, std::int64_t range, std::int64_t count, std::int32_t* out) const;

 private:
  const std::int64_t num_ranges_;
  mutable std::mutex mutex_;
  std::vector<std::vector<std::int32_t>> rows_;  // [slots]
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_BLOCK_TABLE_H_
