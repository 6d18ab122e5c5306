// Append: writes new keys and values into the cache, converted or quantized to its dtype.
#include <algorithm>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {
namespace {

// New tokens per task, and the number of elements below which one thread does all the work.
constexpr std::int64_t kTokensPerTask = 64;
constexpr std::int64_t kInlineElements = 1 << 16;

class Appender {
 public:
  explicit Appender(const AppendArgs& args) : args_(args), kernels_(ActiveKernels()) {}

  void Write(const Sequence& sequence, std::int64_t from, std::int64_t to) const {
    const KVView& kv = args_.kv;
    const auto src_size = static_cast<std::int64_t>(ItemSize(args_.dtype));
    const std::int64_t row = std::int64_t{kv.num_kv_heads} * kv.head_dim;
    const bool dense = kv.head_stride == static_cast<std::int64_t>(kv.head_dim * ItemSize(kv.dtype));
    for (std::int64_t i = from; i < to; ++i) {
      const std::int64_t src = (sequence.query_begin + i) * row * src_size;
      for (int which = 0; which < 2; ++which) {
        const char* from_row = static_cast<const char*>(which == 0 ? args_.k : args_.v) + src;
        char* to_row = kv.At(sequence.slot, sequence.position + i, args_.layer, which, 0);
        if (IsQuantized(kv.dtype)) {
          for (int head = 0; head < kv.num_kv_heads; ++head) {
            kernels_.quantize(to_row + head * kv.head_stride,
                              kv.Scale(sequence.slot, sequence.position + i, args_.layer, which, head), kv.dtype,
                              from_row + head * kv.head_dim * src_size, args_.dtype, kv.head_dim);
          }
          continue;
        }
        if (dense) {
          kernels_.convert(to_row, kv.dtype, from_row, args_.dtype, row);
          continue;
        }
        for (int head = 0; head < kv.num_kv_heads; ++head) {
          kernels_.convert(to_row + head * kv.head_stride, kv.dtype, from_row + head * kv.head_dim * src_size,
                           args_.dtype, kv.head_dim);
        }
      }
    }
  }

 private:
  const AppendArgs& args_;
  const Kernels& kernels_;
};

}  // namespace

void Append(const AppendArgs& args, Parallel& parallel) {
  const Appender appender(args);
  const std::vector<Sequence>& sequences = *args.sequences;
  std::int64_t tokens = 0, longest = 0;
  for (const Sequence& sequence : sequences) {
    tokens += sequence.query_length;
    longest = std::max<std::int64_t>(longest, sequence.query_length);
  }
  if (parallel.num_workers() == 1 || tokens * args.kv.num_kv_heads * args.kv.head_dim < kInlineElements) {
    for (const Sequence& sequence : sequences) appender.Write(sequence, 0, sequence.query_length);
    return;
  }
  // Tasks form a grid: sequences x pieces of the longest sequence. Pieces past the end of a sequence are empty.
  const std::int64_t pieces = (longest + kTokensPerTask - 1) / kTokensPerTask;
  parallel.For(static_cast<std::int64_t>(sequences.size()) * pieces, [&](std::int64_t task, int) {
    const Sequence& sequence = sequences[task / pieces];
    const std::int64_t from = task % pieces * kTokensPerTask;
    appender.Write(sequence, from, std::min<std::int64_t>(from + kTokensPerTask, sequence.query_length));
  });
}

}  // namespace kvpage::cpu
