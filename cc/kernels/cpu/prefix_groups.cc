#include "kernels/cpu/prefix_groups.h"

#include <algorithm>
#include <limits>

#include "base/dtype.h"
#include "kernels/cpu/isa.h"

namespace kvpage::cpu {
namespace {

// Groups places [first, last) of the order, which have `known` spans in common; spans before `from` are already
// grouped. A group has at least `least` spans.
void Split(std::int32_t first, std::int32_t last, std::int32_t known, std::int32_t from, std::int32_t least,
           PrefixGroups* out) {
  while (first < last) {
    std::int32_t end = first + 1, common = std::numeric_limits<std::int32_t>::max();
    for (; end < last && out->common[end] > known; ++end) common = std::min(common, out->common[end]);
    if (end - first > 1) {
      const bool pays = common - from >= least;
      if (pays) out->groups.push_back({first, end - first, from, common});
      Split(first, end, common, pays ? common : from, least, out);
    }
    first = end;
  }
}

// Finds the shared prefixes of sequences that are described by a block table.
const SharedPrefixes& InTable(const AttentionArgs& args, PrefixGroups* out) {
  const KVView& kv = args.kv;
  out->rows.clear();
  for (const Sequence& s : *args.sequences) {
    const std::int64_t chunks = (s.end() + kv.tokens_per_chunk - 1) / kv.tokens_per_chunk;
    const std::int32_t* const blocks = kv.table + s.slot * kv.table_width;
    // A sequence whose beginning was dropped shares nothing.
    out->rows.push_back({blocks, blocks[0] < 0 ? 0 : chunks});
  }
  SharedPrefixes& found = out->in_table;
  FindSharedPrefixes(out->rows, kv.tokens_per_chunk, &found);
  for (std::size_t i = 1; kv.values_apart() && i < found.order.size(); ++i) {
    const std::int32_t* const before = out->rows[found.order[i - 1]].blocks + kv.table_kv_stride;
    const std::int32_t* const end = before + found.common[i] / kv.tokens_per_chunk;
    const std::int32_t* const values = out->rows[found.order[i]].blocks + kv.table_kv_stride;
    found.common[i] = (std::mismatch(before, end, values).first - before) * kv.tokens_per_chunk;
  }
  return found;
}

}  // namespace

void FindPrefixGroups(const AttentionArgs& args, PrefixGroups* out) {
  out->groups.clear();
  out->order.clear();
  out->common.clear();
  if (args.sequences->size() < 2) return;
  const bool by_table = args.kv.table != nullptr;
  if (!by_table && (args.prefixes == nullptr || args.prefixes->empty())) return;
  const SharedPrefixes& prefixes = by_table ? InTable(args, out) : *args.prefixes;
  const int group = args.num_q_heads / args.kv.num_kv_heads;
  std::int64_t common = 0;  // with the last sequence that was included
  for (std::size_t i = 0; i < prefixes.order.size(); ++i) {
    common = std::min(common, prefixes.common[i]);
    const Sequence& sequence = (*args.sequences)[prefixes.order[i]];
    if (std::int64_t{sequence.query_length} * group > kDecodeRows) continue;
    out->order.push_back(prefixes.order[i]);
    out->common.push_back(static_cast<std::int32_t>(common / kSpanTokens));
    common = std::numeric_limits<std::int64_t>::max();
  }
  const KVView& kv = args.kv;
  const auto span_bytes =
      static_cast<std::int64_t>(2 * kSpanTokens * kv.num_kv_heads * kv.head_dim * ItemSize(kv.dtype));
  const auto least = static_cast<std::int32_t>((kLeastSharedBytes + span_bytes - 1) / span_bytes);
  Split(0, static_cast<std::int32_t>(out->order.size()), 0, 0, least, out);
}

}  // namespace kvpage::cpu
