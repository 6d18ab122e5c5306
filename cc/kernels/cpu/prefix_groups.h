// Prefix groups: sequences of a decode batch that walk the spans of a shared prefix together, so that keys and values
// come from memory once and from the cache for all other sequences.
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
  std::vector<PrefixGroup> groups;   // a group comes before those of its members' further spans
  std::vector<std::int32_t> order;   // numbers of sequences
  std::vector<std::int32_t> common;  // [order] whole spans that a sequence shares with the one before it
  SharedPrefixes in_table;           // what the block table of a call says
  std::vector<BlockRun> rows;
};

// Keys and values, of all heads, that a group must share: what is less stays in the second-level caches from one
// sequence to the next without being grouped.
constexpr std::int64_t kLeastSharedBytes = 4 << 20;

// Overwrites *out, whose memory is reused. Only whole spans are walked together, and only by sequences with at most
// kDecodeRows rows: with more, attention is bound by arithmetic.
void FindPrefixGroups(const AttentionArgs& args, PrefixGroups* out);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_PREFIX_GROUPS_H_
