// Python bindings for stores in host memory.
#ifndef KVPAGE_PYTHON_HOST_STORE_BINDING_H_
#define KVPAGE_PYTHON_HOST_STORE_BINDING_H_

#include <nanobind/nanobind.h>

#include <memory>

#include "store/host_store.h"

namespace kvpage {

// Returns null if the object is another kind of store.
std::shared_ptr<store::HostStore> ToHostStore(nanobind::handle object);

void BindHostStore(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_HOST_STORE_BINDING_H_
