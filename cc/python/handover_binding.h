// Sequences on their way between processes, as Python holds them.
#ifndef KVPAGE_PYTHON_HANDOVER_BINDING_H_
#define KVPAGE_PYTHON_HANDOVER_BINDING_H_

#include <nanobind/nanobind.h>

#include "cache/handover.h"
#include "python/pool_reference.h"

namespace kvpage {

// A sequence that was exported, or received; its file is closed with this object, unless a pool has blocks of it.
struct HandoverReference {
  handover::HandoverPtr handover;  // null: closed
};

// Class `Handover`, and the method of `Pool` that makes one.
void BindHandover(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_HANDOVER_BINDING_H_
