// The Python class jax_kvpage._native.JointMaps: how pools of the devices of a mesh map memory together; and functions
// on what their ops fail with.
#ifndef KVPAGE_PYTHON_JOINT_BINDING_H_
#define KVPAGE_PYTHON_JOINT_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

void BindJointMaps(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_JOINT_BINDING_H_
