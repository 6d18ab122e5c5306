// The XLA FFI custom calls of this library, by target name. Handlers decode, check and call; the logic is elsewhere.
#ifndef KVPAGE_FFI_HANDLERS_H_
#define KVPAGE_FFI_HANDLERS_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace kvpage {

struct Target {
  const char* name;
  XLA_FFI_Handler* handler;
};

// Defined in slots.cc and attention.cc; `CpuTargets` is both.
std::vector<Target> SlotTargets();
std::vector<Target> AttentionTargets();

inline std::vector<Target> CpuTargets() {
  std::vector<Target> targets = SlotTargets();
  for (const Target& target : AttentionTargets()) targets.push_back(target);
  return targets;
}

// The same names on CUDA (cuda/); in a build without CUDA there are none.
std::vector<Target> CudaTargets();

}  // namespace kvpage

#endif  // KVPAGE_FFI_HANDLERS_H_
