// CPU kernels over a KVView: attention, append, gather and copies. No XLA, no Python, no pool.
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

  // Active sequences, disjoint and ascending in query_begin. Tokens that none of them owns get out = 0, lse = -inf.
  const std::vector<Sequence>* sequences = nullptr;
  // Which of them begin with the same memory; null: not known. A block table says that by itself.
  const SharedPrefixes* prefixes = nullptr;
  // [num_tokens] The last position that each new token sees, at least 0 and not falling within a sequence, which ends
  // with the last of its tokens' limits; null: a token sees the tokens of its sequence up to itself.
  const std::int32_t* limits = nullptr;

  AttentionOptions options;
};

// Causal attention of every new token over the context of its sequence, new tokens included (they must have been
// appended). lse is the natural log of the softmax denominator (the sink's term included). Fails only when there is no
// memory for the workspace.
Status Attend(const AttentionArgs& args, Parallel& parallel);

struct AppendArgs {
  KVView kv;
  std::int64_t layer = 0;
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], dense
  const void* v = nullptr;
  DType dtype = DType::kF32;  // of k and v (not quantized); converted to kv.dtype, rounding to nearest even
  const std::vector<Sequence>* sequences = nullptr;
};

void Append(const AppendArgs& args, Parallel& parallel);

struct GatherArgs {
  KVView kv;
  std::int64_t layer = 0;
  // For row s of the output: slot and number of tokens to copy, {-1, 0} for padding. The rest of the row is zeroed.
  struct Row {
    std::int32_t slot = -1;
    std::int32_t num_tokens = 0;
  };
  const std::vector<Row>* rows = nullptr;
  std::int64_t row_tokens = 0;  // C
  void* k = nullptr;            // [rows, C, num_kv_heads, head_dim] in kv.dtype; float32 where that is quantized
  void* v = nullptr;
};

void Gather(const GatherArgs& args, Parallel& parallel);

// Copies tokens between slots in all layers, keys, values and scales, bit by bit. Targets are no sources and are
// disjoint.
void CopyTokens(const KVView& kv, std::int64_t num_layers, const TokenCopy* copies, std::int64_t num_copies,
                Parallel& parallel);

// Copies segments to position to[i] on of their targets in all layers: values bit by bit, keys rotated in float32, and
// bit by bit as well where the position stays the same. Targets are no sources and are disjoint.
void CopyRotated(const KVView& kv, std::int64_t num_layers, const SegmentList& list,
                 const std::vector<std::int32_t>& to, const Rotation& rotation, Parallel& parallel);

// Name of the instruction set that the kernels run with: "baseline", "avx2", "avx512", "avx512_bf16".
const char* InstructionSet();

// Not ok when the environment variable JAX_KVPAGE_ISA names an instruction set that this machine or build lacks; the
// kernels then run with the best one there is. For the import to raise.
Status CheckInstructionSet();

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_KERNELS_H_
