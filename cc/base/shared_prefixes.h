// SharedPrefixes: which sequences of a batch begin with the same memory, so that attention can read it once for all of
// them. A kernel may read shared memory through any of the sequences.
#ifndef KVPAGE_BASE_SHARED_PREFIXES_H_
#define KVPAGE_BASE_SHARED_PREFIXES_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvpage {

// The physical blocks of a sequence's first tokens.
struct BlockRun {
  const std::int32_t* blocks = nullptr;
  std::int64_t count = 0;
};

struct SharedPrefixes {
  // Indices of the sequences that may share something; those with a common beginning are adjacent.
  std::vector<std::int32_t> order;
  // [order] number of tokens that a sequence has in common with the one before it in `order`; 0 for the first.
  std::vector<std::int64_t> common;

  void Clear() {
    order.clear();
    common.clear();
  }
  bool empty() const { return order.empty(); }
};

// Compares the runs of sequences 0 .. runs.size() - 1; empty runs are left out. `out` stays empty if no two share a
// block.
inline void FindSharedPrefixes(const std::vector<BlockRun>& runs, std::int64_t block_tokens, SharedPrefixes* out) {
  out->Clear();
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].count > 0) out->order.push_back(static_cast<std::int32_t>(i));
  }
  std::sort(out->order.begin(), out->order.end(), [&](std::int32_t a, std::int32_t b) {
    const BlockRun &x = runs[a], &y = runs[b];
    if (x.blocks[0] != y.blocks[0]) return x.blocks[0] < y.blocks[0];
    return std::lexicographical_compare(x.blocks, x.blocks + x.count, y.blocks, y.blocks + y.count);
  });
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < out->order.size(); ++i) {
    std::int64_t blocks = 0;
    if (i > 0) {
      const BlockRun &x = runs[out->order[i - 1]], &y = runs[out->order[i]];
      const std::int64_t most = std::min(x.count, y.count);
      blocks = std::mismatch(x.blocks, x.blocks + most, y.blocks).first - x.blocks;
    }
    out->common.push_back(blocks * block_tokens);
    longest = std::max(longest, blocks);
  }
  if (longest == 0) out->Clear();
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_SHARED_PREFIXES_H_
