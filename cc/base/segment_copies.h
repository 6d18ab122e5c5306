// The operand of copy_rotated: segments of sequences, to be copied to the end of other sequences at other positions.
#ifndef KVPAGE_BASE_SEGMENT_COPIES_H_
#define KVPAGE_BASE_SEGMENT_COPIES_H_

#include <cstdint>

#include "base/host_device.h"

namespace kvpage {

// A row of the operand int32[n, 5]: tokens begin .. begin + count - 1 of the source, in all layers, are appended to the
// target, whose length grows by `count`. Values are copied bit by bit; keys are rotated to the new positions.
struct SegmentCopy {
  std::int32_t source = -1;  // -1: padding
  std::int32_t target = -1;
  std::int32_t begin = 0;
  std::int32_t count = 0;
  std::int32_t committed = 0;  // of the target, as known to the host: its length must be at least this
  KVPAGE_HOST_DEVICE std::int64_t end() const { return std::int64_t{begin} + count; }
};

struct SegmentList {
  const SegmentCopy* copies = nullptr;
  std::int64_t num_copies = 0;
};

// The angle of pair i in a layer is (new position - old position) * inv_freq[layer][i]. In a layer whose angles are all
// 0, keys are copied bit by bit.
struct Rotation {
  const float* inv_freq = nullptr;  // [num_layers, pairs]
  std::int32_t pairs = 0;
  // If true, a pair is elements 2i and 2i + 1 of a key, otherwise i and i + pairs. Elements from 2 * pairs on are not
  // rotated.
  bool interleaved = false;
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_SEGMENT_COPIES_H_
