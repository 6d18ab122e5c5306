#include "python/joint_binding.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache/joint_maps.h"
#include "cache/registry.h"
#include "cache/shared_faults.h"
#include "python/joint_swap_binding.h"
#include "python/pool_reference.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

class JointReference {
 public:
  explicit JointReference(const std::vector<const PoolReference*>& references) {
    std::vector<PoolPtr> pools;
    for (const PoolReference* reference : references) Raise(reference->Get("KVPool", &pools.emplace_back()));
    Raise(Pool::Join(pools, &maps_));
  }
  JointMaps& maps() const { return *maps_; }
  const std::shared_ptr<JointMaps>& shared() const { return maps_; }
  bool here() const { return ForkCount() == fork_count_; }

 private:
  const int fork_count_ = ForkCount();
  std::shared_ptr<JointMaps> maps_;
};

void Begin(const JointReference& self, const std::vector<std::pair<std::int32_t, std::uint32_t>>& generations) {
  std::vector<JointMaps::Start> starts;
  for (const auto& [generation, epoch] : generations) starts.push_back({generation, epoch});
  const GilRelease release;
  self.maps().Begin(std::move(starts));
}

// Takes no lock in a forked child: the calls in between report that the pool belongs to its parent.
void EnterHost(const JointReference& self) {
  const GilRelease release;
  if (self.here()) self.maps().EnterHost();
}

void LeaveHost(const JointReference& self) {
  const GilRelease release;
  if (self.here()) self.maps().LeaveHost();
}

// Makes the pools of a mesh's devices share faults; each pool comes with the note that ends its messages.
void ShareFaults(const std::vector<std::pair<const PoolReference*, std::string>>& references, bool in_calls) {
  const auto faults = std::make_shared<SharedFaults>(in_calls);
  for (const auto& [reference, note] : references) {
    PoolPtr pool;
    Raise(reference->Get("KVPool", &pool));
    pool->ShareFaults(faults, note);
  }
}

// Raises the fault of an op that ran outside any program; the pool is known from the op's cache.
void TakeFaultOf(std::int32_t id) {
  const GilRelease release;
  PoolPtr pool;
  Raise(Find("check", id, &pool));
  Raise(pool->CheckProcess("check"));
  Raise(pool->TakeFault());
}

}  // namespace

void BindJointMaps(nb::module_& m) {
  nb::class_<JointMaps::Numbers>(m, "JointNumbers")
      .def_ro("decisions", &JointMaps::Numbers::decisions)
      .def_ro("fetched", &JointMaps::Numbers::fetched)
      .def_ro("pending", &JointMaps::Numbers::pending)
      .def_ro("waits", &JointMaps::Numbers::waits);
  nb::class_<JointReference>(m, "JointMaps")
      .def(nb::init<const std::vector<const PoolReference*>&>(), "pools"_a)
      .def("begin", &Begin, "generations"_a)
      .def("enter", &EnterHost)
      .def("leave", &LeaveHost)
      .def(
          "join_swapped", [](const JointReference& self, JointSwapReference& swapped) { swapped.Join(self.shared()); },
          "swapped"_a)
      .def("numbers", [](const JointReference& self) {
        const GilRelease release;
        return self.maps().numbers();
      });
  m.def("share_faults", &ShareFaults, "pools"_a, "in_calls"_a);
  m.def("take_fault_of", &TakeFaultOf, "id"_a);
}

}  // namespace kvpage
