// CUDA functions for Python that do not belong to pools: the report that the doctor prints, and the sizes of scratch
// for custom calls.
#ifndef KVPAGE_PYTHON_CUDA_BINDING_H_
#define KVPAGE_PYTHON_CUDA_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

void BindCuda(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_CUDA_BINDING_H_
