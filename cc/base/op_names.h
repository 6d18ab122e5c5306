// The ops that programs queue, with their names in messages. Host calls (acquire, release, ...) all queue one op,
// edit_slots, and pass it their name as a number.
#ifndef KVPAGE_BASE_OP_NAMES_H_
#define KVPAGE_BASE_OP_NAMES_H_

#include <cstdint>

namespace kvpage {

// The op named at the start of a message. The numbers are part of compiled programs: append, never renumber.
enum class DeviceOp : std::int32_t {
  kMapSlots = 0,
  kAppendKV,
  kPagedAttention,
  kUpdateAndAttend,
  kGatherContext,
  kAdvance,
  kSetLengths,
  kAcquire,
  kRelease,
  kFork,
  kReorder,
  kTruncate,
  kAcquirePrefix,
  kDropBefore,
  kReuseSegment,
  kSwapOut,
  kSwapIn,
  kImportBlocks,
};

inline const char* OpName(DeviceOp op) {
  switch (op) {
    case DeviceOp::kMapSlots:
      return "map_slots";
    case DeviceOp::kAppendKV:
      return "append_kv";
    case DeviceOp::kPagedAttention:
      return "paged_attention";
    case DeviceOp::kUpdateAndAttend:
      return "update_and_attend";
    case DeviceOp::kGatherContext:
      return "read_kv / paged_attention (xla)";
    case DeviceOp::kAdvance:
      return "advance";
    case DeviceOp::kSetLengths:
      return "set_lengths";
    case DeviceOp::kAcquire:
      return "acquire";
    case DeviceOp::kRelease:
      return "release";
    case DeviceOp::kFork:
      return "fork";
    case DeviceOp::kReorder:
      return "reorder";
    case DeviceOp::kTruncate:
      return "truncate";
    case DeviceOp::kAcquirePrefix:
      return "acquire_prefix";
    case DeviceOp::kDropBefore:
      return "drop_before";
    case DeviceOp::kReuseSegment:
      return "reuse_segment";
    case DeviceOp::kSwapOut:
      return "swap_out";
    case DeviceOp::kSwapIn:
      return "swap_in";
    case DeviceOp::kImportBlocks:
      return "import_blocks";
  }
  return "an op";
}

// The host calls for which edit_slots is queued.
inline constexpr DeviceOp kHostVerbs[] = {
    DeviceOp::kAcquire,       DeviceOp::kRelease,    DeviceOp::kFork,    DeviceOp::kReorder, DeviceOp::kTruncate,
    DeviceOp::kAcquirePrefix, DeviceOp::kDropBefore, DeviceOp::kSwapOut, DeviceOp::kSwapIn,  DeviceOp::kImportBlocks};

inline bool IsHostVerb(DeviceOp op) {
  for (const DeviceOp verb : kHostVerbs) {
    if (verb == op) return true;
  }
  return false;
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_OP_NAMES_H_
