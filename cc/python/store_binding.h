// Python bindings for the block store, and for the calls of a pool that use one.
#ifndef KVPAGE_PYTHON_STORE_BINDING_H_
#define KVPAGE_PYTHON_STORE_BINDING_H_

#include <nanobind/nanobind.h>

#include <memory>

#include "python/pool_reference.h"

namespace kvpage {

// Returns the store in a Python object of class `Store`.
std::shared_ptr<store::BlockStore> ToStore(nanobind::handle object);

void BindStore(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_STORE_BINDING_H_
