// The nanobind module jax_kvpage._native: pools, the handler capsules, and properties of the build and the machine.
//
// The GIL is released during everything that may take the pool's locks or make system calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "base/op_names.h"
#include "ffi/handlers.h"
#include "kernels/cpu/kernels.h"
#include "python/cuda_binding.h"
#include "python/errors.h"
#include "python/joint_binding.h"
#include "python/pool_binding.h"
#include "python/prefix_index_binding.h"
#include "vmm/limits.h"
#include "vmm/mappings.h"
#ifdef KVPAGE_TESTING  // defined by CMake in a build with JAX_KVPAGE_TESTING
#include "python/testing_binding.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {

#ifdef KVPAGE_CUDA_ARCHITECTURES  // defined by CMake in a build with CUDA, as is KVPAGE_CUDA_TOOLKIT
#define KVPAGE_CUDA_BUILT KVPAGE_CUDA_ARCHITECTURES
#else
#define KVPAGE_CUDA_BUILT ""
#define KVPAGE_CUDA_TOOLKIT 0
std::vector<Target> CudaTargets() { return {}; }
Status LoadCudaKernels() { return {}; }
#endif

namespace {

nb::dict Registrations(const std::string& platform) {
  nb::dict result;
  for (const Target& target : platform == "cuda" ? CudaTargets() : CpuTargets()) {
    result[target.name] = nb::capsule(reinterpret_cast<void*>(target.handler), "xla._CUSTOM_CALL_TARGET");
  }
  return result;
}

// The numbers that tell edit_slots for which host call it was queued.
nb::dict Verbs() {
  nb::dict result;
  for (const DeviceOp verb : kHostVerbs) result[OpName(verb)] = static_cast<std::int32_t>(verb);
  return result;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled part of jax_kvpage: pools, XLA FFI handlers and CPU kernels. Internal.";
  // Pools may outlive the interpreter by design (programs in flight at exit).
  nb::set_leak_warnings(false);

  BindErrors(m);
  Raise(cpu::CheckInstructionSet());
  m.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("CUDA_ARCHITECTURES") = KVPAGE_CUDA_BUILT;
  m.attr("CUDA_TOOLKIT") = KVPAGE_CUDA_TOOLKIT;
  m.attr("VERBS") = Verbs();
  m.def("registrations", &Registrations, "platform"_a = "cpu");
  m.def("instruction_set", &cpu::InstructionSet);
  m.def("memory_limit_bytes", [] { return MemoryLimitBytes(); });
  m.def("available_bytes", [] { return AvailableBytes(); });
  m.def("max_map_count", &MaxMapCount);
  m.def("worst_mappings", &WorstMappings, "blocks"_a, "ranges"_a, "blocks_per_range"_a);
  m.def("mappings_left", [] { return ProcessMapAccount().Left(); });
  m.def("mapping_share", [] { return ProcessMapAccount().Share(); });
  BindCuda(m);
#ifdef KVPAGE_TESTING
  BindTesting(m);
#endif
  BindPool(m);
  BindJointMaps(m);
  BindPrefixIndex(m);
}

}  // namespace kvpage
