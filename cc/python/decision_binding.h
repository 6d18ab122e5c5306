// Host calls that make decisions about slots: acquire, release, fork, truncate, reuse; and undoing them.
#ifndef KVPAGE_PYTHON_DECISION_BINDING_H_
#define KVPAGE_PYTHON_DECISION_BINDING_H_

#include <nanobind/nanobind.h>

#include "python/pool_reference.h"

namespace kvpage {

// Class `Decision`, and the methods of `Pool` that take one.
void BindDecisions(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_DECISION_BINDING_H_
