// For Python tests: pools with a mirror on devices of the fake driver, and simulated programs on those devices.
#ifndef KVPAGE_PYTHON_FAKE_DEVICES_BINDING_H_
#define KVPAGE_PYTHON_FAKE_DEVICES_BINDING_H_

#include <nanobind/nanobind.h>

#include "base/status.h"
#include "testing/fake_driver.h"

namespace kvpage {

// The process-wide fake driver (testing_binding.cc).
Status GetFakeDriver(FakeDriver** out);

// Registers the backend "fake_cuda" and its class.
void BindFakeDevices(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_FAKE_DEVICES_BINDING_H_
