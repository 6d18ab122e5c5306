// _native.Pool: the methods of kvpage::Pool, bound one by one.
#ifndef KVPAGE_PYTHON_POOL_BINDING_H_
#define KVPAGE_PYTHON_POOL_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

// Adds Pool and the plain structs that its methods return.
void BindPool(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_POOL_BINDING_H_
