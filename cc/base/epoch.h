// Epochs: serial numbers of a pool's changes, compared by the host and by CUDA kernels.
//
// Every op that mutates a cache bumps its pool's epoch; a slot's `since` is the epoch of its last destructive change.
// The numbers wrap, so two of them compare correctly only within a distance of 2^31. RaiseStaleMark keeps old marks
// within that distance.
#ifndef KVPAGE_BASE_EPOCH_H_
#define KVPAGE_BASE_EPOCH_H_

#include <cstdint>

#include "base/host_device.h"

namespace kvpage {

// Whether `a` is older than `b`.
KVPAGE_HOST_DEVICE inline bool Before(std::uint32_t a, std::uint32_t b) { return static_cast<std::int32_t>(a - b) < 0; }

// Whether `epoch`, which was just reached, is one at which every slot's mark must be passed to RaiseStaleMark.
KVPAGE_HOST_DEVICE inline bool MustRaiseStaleMarks(std::uint32_t epoch) { return (epoch & 0x3fffffffu) == 0; }

// Raises a mark that is more than 2^30 behind `epoch` to that distance. At most 2^30 epochs pass between calls, so no
// mark falls behind by 2^31.
KVPAGE_HOST_DEVICE inline void RaiseStaleMark(std::uint32_t epoch, std::uint32_t* since) {
  const std::uint32_t oldest = epoch - 0x40000000u;
  if (Before(*since, oldest)) *since = oldest;
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_EPOCH_H_
