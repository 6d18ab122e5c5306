// Copies segments to other positions for copy_rotated: values are copied bit by bit, keys are rotated.
#include <algorithm>
#include <cstring>

#include "base/cosine.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {
namespace {

constexpr std::int64_t kTokensPerTask = 64;
// Below this many bytes of keys and values, one thread copies everything.
constexpr std::int64_t kInlineBytes = 1 << 17;

// One copy in one layer, with the cosine and sine of each pair's angle. The angles are computed in double: in float,
// the product would be off by a thousandth of a turn after a hundred thousand positions.
struct Turn {
  const SegmentCopy* copy = nullptr;
  std::int32_t to = 0;
  std::int64_t layer = 0;
  bool rotates = false;
  std::vector<float> cosines, sines;
};

Turn MakeTurn(const SegmentCopy& copy, std::int32_t to, std::int64_t layer, const Rotation& rotation) {
  Turn turn;
  turn.copy = &copy;
  turn.to = to;
  turn.layer = layer;
  const float* const inv_freq = rotation.inv_freq + layer * rotation.pairs;
  const double distance = static_cast<double>(to) - copy.begin;
  for (std::int32_t i = 0; i < rotation.pairs; ++i) {
    const double angle = distance * inv_freq[i];
    turn.rotates = turn.rotates || angle != 0.0;
    const CosineAndSine at = CosineAndSineOf(angle);
    turn.cosines.push_back(at.cosine);
    turn.sines.push_back(at.sine);
  }
  return turn;
}

void Rotate(const Turn& turn, const Rotation& rotation, float* row) {
  const std::int64_t step = rotation.interleaved ? 2 : 1, apart = rotation.interleaved ? 1 : rotation.pairs;
  for (std::int64_t i = 0; i < rotation.pairs; ++i) {
    float& x = row[i * step];
    float& y = row[i * step + apart];
    const float rotated_x = x * turn.cosines[i] - y * turn.sines[i];
    const float rotated_y = y * turn.cosines[i] + x * turn.sines[i];
    x = rotated_x;
    y = rotated_y;
  }
}

// The source and destination rows of one token and head.
struct Row {
  char* to = nullptr;
  const char* from = nullptr;
  float* to_scale = nullptr;  // null unless elements are quantized
  const float* from_scale = nullptr;
};

void CopyRow(const KVView& view, const Row& row) {
  std::memcpy(row.to, row.from, static_cast<std::size_t>(view.head_dim) * ItemSize(view.dtype));
  if (row.to_scale != nullptr) *row.to_scale = *row.from_scale;
}

void RotateRow(const KVView& view, const Turn& turn, const Rotation& rotation, const Row& row, float* scratch) {
  const Kernels& kernels = ActiveKernels();
  if (row.to_scale != nullptr) {
    kernels.dequantize(scratch, row.from, view.dtype, *row.from_scale, view.head_dim);
    Rotate(turn, rotation, scratch);
    kernels.quantize(row.to, row.to_scale, view.dtype, scratch, DType::kF32, view.head_dim);
    return;
  }
  kernels.convert(scratch, DType::kF32, row.from, view.dtype, view.head_dim);
  Rotate(turn, rotation, scratch);
  kernels.convert(row.to, view.dtype, scratch, DType::kF32, view.head_dim);
}

// Copies tokens [from, to) of the segment.
void CopyTokens(const KVView& view, const Turn& turn, const Rotation& rotation, std::int64_t from, std::int64_t to) {
  const SegmentCopy& copy = *turn.copy;
  const bool quantized = IsQuantized(view.dtype);
  std::vector<float> scratch(static_cast<std::size_t>(view.head_dim));
  for (const int kv : {0, 1}) {
    for (std::int64_t token = from; token < to; ++token) {
      const std::int64_t old_token = copy.begin + token, new_token = turn.to + token;
      for (std::int64_t head = 0; head < view.num_kv_heads; ++head) {
        Row row;
        row.to = view.At(copy.target, new_token, turn.layer, kv, head);
        row.from = view.At(copy.source, old_token, turn.layer, kv, head);
        if (quantized) {
          row.to_scale = view.Scale(copy.target, new_token, turn.layer, kv, head);
          row.from_scale = view.Scale(copy.source, old_token, turn.layer, kv, head);
        }
        if (kv == 0 && turn.rotates) {
          RotateRow(view, turn, rotation, row, scratch.data());
        } else {
          CopyRow(view, row);
        }
      }
    }
  }
}

}  // namespace

void CopyRotated(const KVView& kv, std::int64_t num_layers, const SegmentList& list,
                 const std::vector<std::int32_t>& to, const Rotation& rotation, Parallel& parallel) {
  std::vector<Turn> turns;
  std::int64_t tokens = 0, longest = 0;
  for (std::int64_t i = 0; i < list.num_copies; ++i) {
    const SegmentCopy& copy = list.copies[i];
    if (copy.source == -1 || copy.count == 0) continue;
    for (std::int64_t layer = 0; layer < num_layers; ++layer) {
      turns.push_back(MakeTurn(copy, to[i], layer, rotation));
    }
    tokens += copy.count;
    longest = std::max<std::int64_t>(longest, copy.count);
  }
  // Tasks form a grid: (copy, layer) x pieces of the longest segment. Pieces past the end of a segment are empty.
  const std::int64_t pieces = (longest + kTokensPerTask - 1) / kTokensPerTask;
  const std::int64_t tasks = static_cast<std::int64_t>(turns.size()) * pieces;
  const auto task = [&](std::int64_t i, int) {
    const Turn& turn = turns[i / pieces];
    const std::int64_t from = i % pieces * kTokensPerTask;
    const std::int64_t end = std::min<std::int64_t>(from + kTokensPerTask, turn.copy->count);
    CopyTokens(kv, turn, rotation, from, end);
  };
  const auto token_bytes = static_cast<std::int64_t>(ItemSize(kv.dtype)) * kv.head_dim * kv.num_kv_heads * num_layers;
  if (parallel.num_workers() == 1 || tokens * token_bytes < kInlineBytes) {
    for (std::int64_t i = 0; i < tasks; ++i) task(i, 0);
    return;
  }
  parallel.For(tasks, task);
}

}  // namespace kvpage::cpu
