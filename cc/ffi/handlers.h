// The XLA FFI custom calls of this library, by target name. Handlers only decode, check and call; the logic is
// elsewhere.
#ifndef KVPAGE_FFI_HANDLERS_H_
#define KVPAGE_FFI_HANDLERS_H_

#include <vector>

#include "base/status.h"
#include "xla/ffi/api/c_api.h"

namespace kvpage {

struct Target {
  const char* name;
  XLA_FFI_Handler* handler;
};

// Defined in slots.cc, attention.cc, views.cc and shard_faults.cc; `CpuTargets` returns all of them.
std::vector<Target> SlotTargets();
std::vector<Target> AttentionTargets();
std::vector<Target> ViewTargets();
std::vector<Target> FaultTargets();

inline std::vector<Target> CpuTargets() {
  std::vector<Target> targets = SlotTargets();
  for (const Target& target : AttentionTargets()) targets.push_back(target);
  for (const Target& target : ViewTargets()) targets.push_back(target);
  for (const Target& target : FaultTargets()) targets.push_back(target);
  return targets;
}

// The targets with the same names on CUDA (cuda/), except those for views and for ops on several devices; empty in a
// build without CUDA.
std::vector<Target> CudaTargets();

// Loads the kernels of the CUDA targets on the current device; does nothing in a build without CUDA.
Status LoadCudaKernels();

}  // namespace kvpage

#endif  // KVPAGE_FFI_HANDLERS_H_
