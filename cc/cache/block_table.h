// BlockTable: the physical block of each logical block of every range and slot. The arena updates it together with the
// page table; kernels that address blocks by number (addressing="table") get copies of its rows.
//
// One thread at a time writes, holding supply's mapping mutex, which also guards reading a slot's row in place.
// Handlers copy rows while they hold the state mutex, and must not wait for the mapping mutex, which is held while
// memory is mapped. So the table has its own mutex, the last in the lock order, which is held only while a few numbers
// are written or copied.
#ifndef KVPAGE_CACHE_BLOCK_TABLE_H_
#define KVPAGE_CACHE_BLOCK_TABLE_H_

#include <cstdint>
#include <mutex>
#include <vector>

namespace kvpage {

class BlockTable {
 public:
  BlockTable(std::int64_t num_slots, std::int64_t num_ranges) : num_ranges_(num_ranges), rows_(num_slots) {}

  // ---- the caller must hold the mapping mutex ----
  // [logical blocks, ranges] of a slot, so that an empty slot uses no memory here, and a row grows and shrinks at its
  // end.
  const std::vector<std::int32_t>& operator[](std::int64_t slot) const { return rows_[slot]; }
  // Appends logical blocks: `blocks.size() / num_ranges` blocks for each range in turn.
  void Append(std::int64_t slot, const std::vector<std::int32_t>& blocks);
  // Removes logical blocks from `blocks` on.
  void Truncate(std::int64_t slot, std::int64_t blocks);
  // Appends the logical blocks of slot `from`, starting at `begin`.
  void AppendFrom(std::int64_t slot, std::int64_t from, std::int64_t begin);
  // Sets the blocks, [blocks, ranges], of an empty slot; they may belong to another slot as well.
  void Assign(std::int64_t slot, const std::int32_t* map, std::int64_t blocks);
  // Marks the first `blocks` logical blocks as no longer mapped (-1).
  void Drop(std::int64_t slot, std::int64_t blocks);
  void Replace(std::int64_t slot, std::int64_t logical, std::int64_t range, std::int32_t block);

  // ---- thread-safe ----
  // Copies the first `count` blocks of a range, -1 for dropped ones; returns false if the slot has fewer.
  bool Copy(std::int64_t slot, std::int64_t range, std::int64_t count, std::int32_t* out) const;

 private:
  const std::int64_t num_ranges_;
  mutable std::mutex mutex_;
  std::vector<std::vector<std::int32_t>> rows_;  // [slots]
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_BLOCK_TABLE_H_
