// What Python sees of CUDA beside the pools: the report that the doctor prints, and the fake driver of the tests.
#ifndef KVPAGE_PYTHON_CUDA_BINDING_H_
#define KVPAGE_PYTHON_CUDA_BINDING_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "vmm/vmm.h"

namespace kvpage {

void BindCuda(nanobind::module_& m);

// Memory of the process's fake driver, which is host memory: CPU handlers serve such a pool.
Status MakeFakeVmm(std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_CUDA_BINDING_H_
