// CUDA in Python, apart from the pools: the report that the doctor prints, and the scratch that
// custom calls need.
#ifndef KVPAGE_PYTHON_CUDA_BINDING_H_
#define KVPAGE_PYTHON_CUDA_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

void BindCuda(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_CUDA_BINDING_H_
