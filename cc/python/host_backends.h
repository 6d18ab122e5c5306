// Backends by name. Host backends provide a pool's memory where CPU handlers serve it: every build has "cpu"; a build
// with JAX_KVPAGE_TESTING registers "fake" (testing_binding.cc). Device backends open the device of a pool with a
// mirror: every build has "cuda"; a build with JAX_KVPAGE_TESTING registers "fake_cuda" (fake_devices_binding.cc), on
// which tests simulate programs.
#ifndef KVPAGE_PYTHON_HOST_BACKENDS_H_
#define KVPAGE_PYTHON_HOST_BACKENDS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "device/device_state.h"
#include "vmm/vmm.h"

namespace kvpage {

// `device`: for backends whose memory belongs to a device.
using MakeVmm = Status (*)(int device, std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out);
using OpenDeviceState = Status (*)(int ordinal, std::shared_ptr<DeviceState>* out);

// Call it only while the module is initialised: the table has no lock.
void RegisterHostBackend(const std::string& name, MakeVmm make);
void RegisterDeviceBackend(const std::string& name, OpenDeviceState open);

// Returns null if this build has no such backend.
MakeVmm FindHostBackend(const std::string& name);
OpenDeviceState FindDeviceBackend(const std::string& name);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_HOST_BACKENDS_H_
