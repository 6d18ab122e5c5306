// Prefix groups: sequences of a decode batch that process the spans of a shared prefix together, so that one sequence
// reads the keys and values from memory and the others read them from the cache.
#ifndef KVPAGE_KERNELS_CPU_PREFIX_GROUPS_H_
#define KVPAGE_KERNELS_CPU_PREFIX_GROUPS_H_

#include <cstdint>
#include <vector>

#include "base/shared_prefixes.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {

// Sequences order[first .. first + count) of PrefixGroups, spans [span_begin, span_end).
struct PrefixGroup {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t span_begin = 0;
  std::int32_t span_end = 0;
};

struct PrefixGroups {
  std::vector<PrefixGroup> groups;   // a group precedes the groups of its members' later spans
  std::vector<std::int32_t> order;   // indices of sequences
  std::vector<std::int32_t> common;  // [order] full spans that a sequence shares with the one before it
  SharedPrefixes in_table;           // found from the block table of a call
  std::vector<BlockRun> rows;
};

// The least size of the keys and values, over all heads, that a group must share. Less than this stays in the L2 caches
// from one sequence to the next even without grouping.
constexpr std::int64_t kLeastSharedBytes = 4 << 20;

// Overwrites *out, reusing its memory. Only full spans are processed together, and only for sequences with at most
// kDecodeRows rows: with more rows, attention is bound by arithmetic.
void FindPrefixGroups(const AttentionArgs& args, PrefixGroups* out);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_PREFIX_GROUPS_H_
