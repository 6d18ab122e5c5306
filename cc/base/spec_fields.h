// The fields of a resolved cache spec by name: eight int64 that every compiled program carries as its `spec` attribute
// and that must equal those of the pool. CacheSpec.as_ints() in Python writes them in this order.
#ifndef KVPAGE_BASE_SPEC_FIELDS_H_
#define KVPAGE_BASE_SPEC_FIELDS_H_

#include <array>
#include <cstdint>

namespace kvpage {

// Indices into SpecInts; unscoped, so that kernels can use them as array indices too.
enum SpecField : int {
  kSpecNumLayers = 0,
  kSpecNumKVHeads,
  kSpecHeadDim,
  kSpecMaxSlots,
  kSpecMaxSeqLen,
  kSpecDType,   // a code: DType
  kSpecLayout,  // a code: Layout
  kSpecBlockTokens,
  kNumSpecFields,
};

using SpecInts = std::array<std::int64_t, kNumSpecFields>;

inline constexpr const char* kSpecFieldNames[kNumSpecFields] = {
    "num_layers", "num_kv_heads", "head_dim", "max_slots", "max_seq_len", "dtype", "layout", "block_tokens"};

// Codes start at 0, other numbers at 1.
constexpr bool IsSpecCode(int field) { return field == kSpecDType || field == kSpecLayout; }

}  // namespace kvpage

#endif  // KVPAGE_BASE_SPEC_FIELDS_H_
