// The fake driver for Python tests. Only in builds with JAX_KVPAGE_TESTING, never in a wheel.
#ifndef KVPAGE_PYTHON_TESTING_BINDING_H_
#define KVPAGE_PYTHON_TESTING_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

// Adds `fake_driver` to the module and registers the host backend "fake": CUDA memory management on the fake driver,
// whose memory is host memory.
void BindTesting(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_TESTING_BINDING_H_
