// Python bindings for sequences that are handed over between processes.
#ifndef KVPAGE_PYTHON_HANDOVER_BINDING_H_
#define KVPAGE_PYTHON_HANDOVER_BINDING_H_

#include <nanobind/nanobind.h>

#include "cache/handover.h"
#include "python/pool_reference.h"

namespace kvpage {

// A sequence that was exported or received. Its file is closed with this object, unless a pool has blocks in it.
struct HandoverReference {
  handover::HandoverPtr handover;  // null: closed
};

// Class `Handover`, and the method of `Pool` that creates one.
void BindHandover(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_HANDOVER_BINDING_H_
