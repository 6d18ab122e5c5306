// The interface between code that is compiled once and code that is compiled for every instruction set.
//
// attend.cc, append.cc and gather.cc decide what to do and are compiled with the default flags. The arithmetic is in
// isa/*-inl.h, which isa/baseline.cc, isa/avx2.cc, ... compile with their own flags and export as a table of function
// pointers. Only plain structs cross the interface: if a template or inline function were instantiated in such a file,
// the linker could keep that copy for the whole program, and it would fault on an older machine. This is why the
// functions below are `static`; check_symbols.py checks the object files.
#ifndef KVPAGE_KERNELS_CPU_ISA_H_
#define KVPAGE_KERNELS_CPU_ISA_H_

#include <cstdint>

#include "base/dtype.h"

namespace kvpage::cpu {

// The kernels process the context in parts that end at multiples of kSpanTokens, and a part in tiles that end at
// multiples of the tile size. Both are counted from position 0 of the sequence, never from a chunk or a task, so that
// results do not depend on placement or on threads.
constexpr int kSpanTokens = 512;
constexpr int kTileTokens = 64;
// Up to this many addresses after the end of a span may be listed for prefetching.
constexpr int kLookahead = kTileTokens;
// Scales of a span, plus padding so that the last ones can be read in whole vectors.
constexpr int kSpanScales = kSpanTokens + kTileTokens;

// The kernels read a quantized element as a number this many times smaller: 8-bit floats are converted through float16,
// whose exponent bias is larger by 8. The factor is applied to the scales.
static constexpr float ElementUnit(DType dtype) { return dtype == DType::kF8E4M3 ? 256.0f : 1.0f; }

// A row is one (query token, query head) pair that reads a KV head. Up to kDecodeRows rows are decode: dot products
// that stream K and V, bound by memory. More rows are prefill: blocked matrix products on packed tiles, bound by
// arithmetic.
constexpr int kDecodeRows = 8;
constexpr int kRowBlock = 12;
constexpr int kMaxRows = 64 * kRowBlock;
// Tokens per tile of prefill.
constexpr int kPrefillTokens = 256;
// At most this many KV heads are processed together, if the heads of a token are contiguous.
constexpr int kMaxHeads = 16;

static constexpr int PaddedRows(int rows) {
  return rows <= kDecodeRows ? rows : (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
}
// Query and accumulator rows are zero-padded to whole vectors of every instruction set, also in bfloat16.
static constexpr int PaddedDim(int head_dim) { return (head_dim + 31) / 32 * 32; }

// If only a scale follows the dot products, they stay unscaled, and so do the maxima of softmax states; the scale
// multiplies differences instead. A scaled maximum would be rounded (by hundreds if scores are near 1e10) and could
// overflow. (A subnormal scale may be treated as 0, and masked scores times 0 are NaN.)
static constexpr bool OnlyScales(float scale, float soft_cap, bool has_slopes) {
  return scale >= 0x1p-126f && soft_cap <= 0.0f && !has_slopes;
}
// A state's maximum times this is the maximum score.
static constexpr float StateScale(float scale, float soft_cap, bool has_slopes) {
  return OnlyScales(scale, soft_cap, has_slopes) ? scale : 1.0f;
}

// Size of the softmax state of a KV head over part of the context; see isa/state-inl.h for the layout.
static constexpr std::int64_t StateFloats(int rows, int head_dim) {
  return (static_cast<std::int64_t>(PaddedRows(rows)) * (PaddedDim(head_dim) + 3) + 15) / 16 * 16;
}
// Query rows of one head: float32[rows, padded_dim], followed by the unconverted rows if they are bfloat16. The first
// part is not written if the kernels use only the second.
static constexpr std::int64_t QueryFloats(int rows, int head_dim) {
  return (static_cast<std::int64_t>(PaddedRows(rows)) * PaddedDim(head_dim) * 3 / 2 + 15) / 16 * 16;
}
// Scratch memory of a kernel. Decode: for each row and head, the scores of a tile and, for quantized elements, the
// query and weight operands (see isa/avx512_bf16/quantized_operands-inl.h); two converted tiles. Prefill: two packed
// tiles, the scores of a block of rows, and a panel of values.
static constexpr std::int64_t ScratchFloats(int rows, int head_dim, int heads) {
  return rows <= kDecodeRows ? std::int64_t{heads} * rows * (2 * kTileTokens + PaddedDim(head_dim) + 64) +
                                   2 * kTileTokens * PaddedDim(head_dim) + 128
                             : kPrefillTokens * (2 * std::int64_t{PaddedDim(head_dim)} + kRowBlock + 32);
}

// Rows first_row .. first_row + rows - 1 of a sequence and a KV head. Row r belongs to query token r / group and query
// head kv_head * group + r % group.
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
  const void* q = nullptr;  // at the sequence's first new token
  DType dtype = DType::kF32;
  DType kv_dtype = DType::kF32;  // of keys and values; with exact_weights it selects the kernels
  bool exact_weights = false;
  float* dst = nullptr;  // QueryFloats floats
};

struct SpanArgs {
  QueryTile tile;
  // keys[i] is the address of the key at position begin + i of the first KV head. Entries from `end` to `readable` are
  // only prefetched: the positions that follow, or the keys that will probably be read next.
  const char* const* keys = nullptr;
  // The value at position begin + i is at values[i] + value_offset. If all values are at the same distance from their
  // keys, this is the list of keys.
  const char* const* values = nullptr;
  std::int64_t value_offset = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t readable = 0;
  std::int64_t head_stride = 0;
  // [heads][K|V][kSpanScales], starting at position begin, multiplied by ElementUnit; zeros past the end. Null if dtype
  // is not quantized.
  const float* scales = nullptr;
  DType dtype = DType::kF32;
  int heads = 1;             // KV heads to process together, tile by tile
  const float* q = nullptr;  // [heads], QueryFloats floats each
  bool q_is_bf16 = false;
  const std::int32_t* positions = nullptr;  // [rows] absolute position of each row, ascending
  const float* slopes = nullptr;            // [heads, group] or null
  bool exact_weights = false;               // keep softmax weights more precise than bfloat16
  float scale = 1.0f;
  float soft_cap = 0.0f;
  std::int32_t window = 0;
  float* scratch = nullptr;  // ScratchFloats floats
  float* state = nullptr;    // [heads], StateFloats floats each
  bool resume = false;       // the state already covers earlier positions; otherwise it is overwritten
  bool more = false;         // decode: a call with `resume` follows, and nobody reads the state before it
};

struct FinishArgs {
  QueryTile tile;
  int kv_head = 0;
  const float* state = nullptr;
  float state_scale = 1.0f;      // StateScale of the call
  const float* sinks = nullptr;  // [num_q_heads] or null
  void* out = nullptr;           // at the sequence's first new token
  DType dtype = DType::kF32;
  float* lse = nullptr;  // as `out`, or null
};

struct Kernels {
  const char* name;
  void (*load)(const LoadArgs& args);
  void (*attend)(const SpanArgs& args);
  // Merges `from` into `into`, both with `rows` rows. state_scale: StateScale of the call.
  void (*merge)(float* into, const float* from, int rows, int head_dim, float state_scale);
  void (*finish)(const FinishArgs& args);
  // Converts n elements of types that are not quantized, rounding to nearest even.
  void (*convert)(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n);
  // Quantizes a row of n elements that share a scale; see isa/quantize-inl.h.
  void (*quantize)(void* dst, float* scale, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n);
  void (*dequantize)(float* dst, const void* src, DType src_dtype, float scale, std::int64_t n);
};

// Each instruction set's table, defined in the set's own namespace (isa/<set>.cc); null if the compiler does not target
// the set.
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

// The active table: the best set that the machine supports, or the one that JAX_KVPAGE_ISA names.
const Kernels& ActiveKernels();

// For tests: switches the table; returns null if this machine or build lacks the set. Must not be called while kernels
// run.
const Kernels* ForceInstructionSet(const char* name);

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_ISA_H_
