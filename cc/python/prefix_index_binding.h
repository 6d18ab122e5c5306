// The prefix index without a pool, for tests and benchmarks.
#ifndef KVPAGE_PYTHON_PREFIX_INDEX_BINDING_H_
#define KVPAGE_PYTHON_PREFIX_INDEX_BINDING_H_

#include <nanobind/nanobind.h>

namespace kvpage {

// Class `PrefixIndex`, and the classes of its results.
void BindPrefixIndex(nanobind::module_& m);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_PREFIX_INDEX_BINDING_H_
