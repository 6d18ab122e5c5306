// The seam between the code that is compiled once and the code that is compiled for every instruction set.
//
// attend.cc, append.cc and gather.cc decide what to do and are compiled with the default flags. The arithmetic is in
// isa/*-inl.h, which isa/baseline.cc, isa/avx2.cc, ... compile with their own flags and hand out as a table of function
// pointers. Only plain structs cross the seam: a template or inline function instantiated in such a file could be the
// copy that the linker keeps for everybody, and fault on an older machine (hence `static` on the functions below;
// check_symbols.py looks at the objects).
#ifndef KVPAGE_KERNELS_CPU_ISA_H_
#define KVPAGE_KERNELS_CPU_ISA_H_

#include <cstdint>

#include "base/dtype.h"

namespace kvpage::cpu {

// The kernels take the context in parts between multiples of kSpanTokens, a part in tiles between multiples of the
// tile. Both count from position 0 of the sequence, never from a chunk or a task, so that a result does not depend on
// placement or on threads.
constexpr int kSpanTokens = 512;
constexpr int kTileTokens = 64;
// Addresses past a span that may be listed for prefetching.
constexpr int kLookahead = kTileTokens;
// Scales of a span, and room for reading the last ones in whole vectors.
constexpr int kSpanScales = kSpanTokens + kTileTokens;

// The kernels read a quantized element as a number this many times smaller: 8-bit floats are converted through float16,
// whose exponent is biased by 8 more. The factor goes into the scales.
static constexpr float ElementUnit(DType dtype) { return dtype == DType::kF8E4M3 ? 256.0f : 1.0f; }

// A row is one (query token, query head) that reads a KV head. Up to kDecodeRows are decode: dot products that stream K
// and V, bound by memory. More are prefill: blocked matrix products on packed tiles, bound by arithmetic.
constexpr int kDecodeRows = 8;
constexpr int kRowBlock = 12;
constexpr int kMaxRows = 64 * kRowBlock;
// Tokens of a tile of prefill.
constexpr int kPrefillTokens = 256;
// KV heads that are walked together at most, where a token's heads lie next to each other.
constexpr int kMaxHeads = 16;

static constexpr int PaddedRows(int rows) {
  return rows <= kDecodeRows ? rows : (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
}
// Query and accumulator rows are zero-padded to whole vectors of any instruction set, in bfloat16 too.
static constexpr int PaddedDim(int head_dim) { return (head_dim + 31) / 32 * 32; }

// Where nothing but a scale follows the dot products they stay unscaled, and so do the maxima of softmax states; the
// scale multiplies differences. A scaled maximum would be rounded, by hundreds where scores are near 1e10, and could
// overflow. (A scale below normal floats may count as 0, and masked scores times 0 are NaN.)
static constexpr bool OnlyScales(float scale, float soft_cap, bool has_slopes) {
  return scale >= 0x1p-126f && soft_cap <= 0.0f && !has_slopes;
}
// The maximum of a state times this is a score.
static constexpr float StateScale(float scale, float soft_cap, bool has_slopes) {
  return OnlyScales(scale, soft_cap, has_slopes) ? scale : 1.0f;
}

// The softmax state of a KV head over part of the context; isa/state-inl.h has the layout.
static constexpr std::int64_t StateFloats(int rows, int head_dim) {
  return (static_cast<std::int64_t>(PaddedRows(rows)) * (PaddedDim(head_dim) + 3) + 15) / 16 * 16;
}
// Query rows of one head: float32[rows, padded_dim], then, where they are bfloat16, the same unconverted. The first
// part is not written where kernels use the second one only.
static constexpr std::int64_t QueryFloats(int rows, int head_dim) {
  return (static_cast<std::int64_t>(PaddedRows(rows)) * PaddedDim(head_dim) * 3 / 2 + 15) / 16 * 16;
}
// Scratch memory of a kernel. Decode: for a row and head the scores of a tile and, of quantized elements, the operands
// of query and weights (see isa/avx512_bf16/quantized_operands-inl.h); two converted tiles. Prefill: two packed tiles,
// scores of a block of rows and a panel of values.
static constexpr std::int64_t ScratchFloats(int rows, int head_dim, int heads) {
  return rows <= kDecodeRows ? std::int64_t{heads} * rows * (2 * kTileTokens + PaddedDim(head_dim) + 64) +
                                   2 * kTileTokens * PaddedDim(head_dim) + 128
                             : kPrefillTokens * (2 * std::int64_t{PaddedDim(head_dim)} + kRowBlock + 32);
}

// Rows first_row .. first_row + rows - 1 of a sequence and a KV head; row r is query token r / group, and query head
// kv_head * group + r % group.
struct QueryTile {
  int rows = 0;
  std::int64_t first_row = 0;
  int group = 1;
  int num_q_heads = 0;
  int head_dim = 0;
};

struct LoadArgs {
  QueryTile tile;
  int kv_head = 0;
  const void* q = nullptr;  // of the sequence's first new token
  DType dtype = DType::kF32;
  DType kv_dtype = DType::kF32;  // of the keys and values; it and exact_weights decide which kernels read the queries
  bool exact_weights = false;
  float* dst = nullptr;  // QueryFloats
};

struct SpanArgs {
  QueryTile tile;
  // keys[i] is the address of the key at position begin + i of the first KV head. Those from end up to readable are
  // only prefetched: the following positions, or the keys that will probably be read next.
  const char* const* keys = nullptr;
  // The value at position begin + i is at values[i] + value_offset. Where all values lie at one distance from their
  // keys this is the list of keys.
  const char* const* values = nullptr;
  std::int64_t value_offset = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t readable = 0;
  std::int64_t head_stride = 0;
  // [heads][K|V][kSpanScales] from position begin on, times ElementUnit; zeros past the end. Null where dtype is not
  // quantized.
  const float* scales = nullptr;
  DType dtype = DType::kF32;
  int heads = 1;             // KV heads to walk together, tile by tile
  const float* q = nullptr;  // [heads] of QueryFloats
  bool q_is_bf16 = false;
  const std::int32_t* positions = nullptr;  // [rows] absolute position of each row, ascending
  const float* slopes = nullptr;            // [heads, group] or null
  bool exact_weights = false;               // softmax weights count with more than bfloat16 precision
  float scale = 1.0f;
  float soft_cap = 0.0f;
  std::int32_t window = 0;
  float* scratch = nullptr;  // ScratchFloats
  float* state = nullptr;    // [heads] of StateFloats
  bool resume = false;       // whether the state already covers earlier positions; else it is overwritten
  bool more = false;         // decode: whether a call with `resume` follows, until which nobody reads the state
};

struct FinishArgs {
  QueryTile tile;
  int kv_head = 0;
  const float* state = nullptr;
  float state_scale = 1.0f;      // StateScale of the call
  const float* sinks = nullptr;  // [num_q_heads] or null
  void* out = nullptr;           // of the sequence's first new token
  DType dtype = DType::kF32;
  float* lse = nullptr;  // the same, or null
};

struct Kernels {
  const char* name;
  void (*load)(const LoadArgs& args);
  void (*attend)(const SpanArgs& args);
  // into = into merged with from, both over `rows` rows. state_scale: StateScale of the call.
  void (*merge)(float* into, const float* from, int rows, int head_dim, float state_scale);
  void (*finish)(const FinishArgs& args);
  // n elements, not quantized; rounds to nearest even.
  void (*convert)(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n);
  // A row of n elements that share a scale; see isa/quantize-inl.h.
  void (*quantize)(void* dst, float* scale, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n);
  void (*dequantize)(float* dst, const void* src, DType src_dtype, float scale, std::int64_t n);
};

// The tables of the instruction sets, each defined in the set's own namespace (isa/<set>.cc); null where the compiler
// does not target the set.
namespace baseline {
const Kernels* Table();
}
namespace avx2 {
const Kernels* Table();
}
namespace avx512 {
const Kernels* Table();
}
namespace avx512_bf16 {
const Kernels* Table();
}

// The table in use: the best that the machine has, or what JAX_KVPAGE_ISA names.
const Kernels& ActiveKernels();

// Tests only: switches the table; null if this machine or build lacks it. Not while kernels run.
const Kernels* ForceInstructionSet(const char* name);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_ISA_H_
