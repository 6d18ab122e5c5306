// The Python class jax_kvpage._native.JointMaps, through which the pools of a mesh's devices map memory together, and
// functions for the faults of their ops.
#ifndef KVPAGE_PYTHON_JOINT_BINDING_H_
#define KVPAGE_PYTHON_JOINT_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

void BindJointMaps(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_JOINT_BINDING_H_
