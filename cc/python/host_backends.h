// Host backends: who gives a pool its memory, by name, where CPU handlers serve the pool. Every build has "cpu"; a
// build with JAX_KVPAGE_TESTING registers "fake" (testing_binding.cc).
#ifndef KVPAGE_PYTHON_HOST_BACKENDS_H_
#define KVPAGE_PYTHON_HOST_BACKENDS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "vmm/vmm.h"

namespace kvpage {

using MakeVmm = Status (*)(std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out);

// Only while the module is initialised: the table has no lock.
void RegisterHostBackend(const std::string& name, MakeVmm make);

// Null when this build has no such backend.
MakeVmm FindHostBackend(const std::string& name);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_HOST_BACKENDS_H_
