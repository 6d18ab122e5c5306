// CPU kernels over a KVView: attention, append, gather and copies. They do not depend on XLA, Python or the pool.
#ifndef KVPAGE_KERNELS_CPU_KERNELS_H_
#define KVPAGE_KERNELS_CPU_KERNELS_H_

#include <cstdint>
#include <vector>

#include "base/attention_options.h"
#include "base/dtype.h"
#include "base/kv_view.h"
#include "base/parallel.h"
#include "base/segment_copies.h"
#include "base/shared_prefixes.h"
#include "base/slot_edits.h"
#include "base/status.h"

namespace kvpage::cpu {

struct AttentionArgs {
  KVView kv;
  std::int64_t layer = 0;

  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim], dense
  DType q_dtype = DType::kF32;
  void* out = nullptr;   // like q
  float* lse = nullptr;  // [num_tokens, num_q_heads] or null
  std::int64_t num_tokens = 0;
  std::int32_t num_q_heads = 0;  // a multiple of kv.num_kv_heads

  // Active sequences: disjoint, in ascending order of query_begin. Tokens outside of them get out = 0 and lse = -inf.
  const std::vector<Sequence>* sequences = nullptr;
  // Which of the sequences begin with the same memory; null if unknown. Not needed with a block table, which shows it.
  const SharedPrefixes* prefixes = nullptr;
  // [num_tokens] Last position that each new token sees: at least 0, not decreasing within a sequence. The sequence
  // ends with its last token's limit. If null, attention is causal: a token sees its sequence up to and including
  // itself.
  const std::int32_t* limits = nullptr;

  AttentionOptions options;
};

// Causal attention of every new token over the context of its sequence, including the new tokens, which must have been
// appended. lse is the natural log of the softmax denominator, including the sink's term. Fails only if the workspace
// cannot be allocated.
Status Attend(const AttentionArgs& args, Parallel& parallel);

struct AppendArgs {
  KVView kv;
  std::int64_t layer = 0;
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], dense
  const void* v = nullptr;
  DType dtype = DType::kF32;  // of k and v, not quantized; converted to kv.dtype, rounding to nearest even
  const std::vector<Sequence>* sequences = nullptr;
};

void Append(const AppendArgs& args, Parallel& parallel);

struct GatherArgs {
  KVView kv;
  std::int64_t layer = 0;
  // Source of row s of the output: slot and number of tokens to copy; {-1, 0} for padding. The rest of the row is
  // zeroed.
  struct Row {
    std::int32_t slot = -1;
    std::int32_t num_tokens = 0;
  };
  const std::vector<Row>* rows = nullptr;
  std::int64_t row_tokens = 0;  // C
  void* k = nullptr;            // [rows, C, num_kv_heads, head_dim] in kv.dtype, or float32 if that is quantized
  void* v = nullptr;
};

void Gather(const GatherArgs& args, Parallel& parallel);

// Copies tokens (keys, values and scales) between slots in all layers, bit by bit. Targets must be disjoint and must
// not be sources.
void CopyTokens(const KVView& kv, std::int64_t num_layers, const TokenCopy* copies, std::int64_t num_copies,
                Parallel& parallel);

// Copies segments to positions from to[i] on of their targets, in all layers. Values are copied bit by bit; keys are
// rotated in float32, or copied bit by bit if the position stays the same. Targets must be disjoint and must not be
// sources.
void CopyRotated(const KVView& kv, std::int64_t num_layers, const SegmentList& list,
                 const std::vector<std::int32_t>& to, const Rotation& rotation, Parallel& parallel);

// The name of the active instruction set: "baseline", "avx2", "avx512" or "avx512_bf16".
const char* InstructionSet();

// Returns an error if the environment variable JAX_KVPAGE_ISA names an instruction set that this machine or build
// lacks; the kernels then use the best available set. Called at import.
Status CheckInstructionSet();

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_KERNELS_H_
