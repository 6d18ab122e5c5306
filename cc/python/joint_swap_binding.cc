#include "python/joint_swap_binding.h"

#include <nanobind/stl/string.h>

#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {

void JointSwapReference::Join(const std::shared_ptr<JointMaps>& maps) {
  std::vector<SwapReference*> references;
  std::vector<SwapPtr> parts;
  for (const nb::handle part : parts_) {
    references.push_back(nb::cast<SwapReference*>(part));
    parts.push_back(references.back()->swap());
  }
  const GilRelease release;
  joint_ = JointSwap::Make(maps, std::move(parts));
  for (SwapReference* reference : references) reference->set_joined();
}

JointSwap& JointSwapReference::joint() const {
  if (joint_ == nullptr) throw nb::value_error("the sequence has not been swapped out");
  return *joint_;
}

bool JointSwapReference::Wait(double seconds) const {
  // A forked child must not take the pools' locks.
  return ForkCount() == fork_count_ ? joint_->Wait(seconds) : joint_->parts()[0]->Wait(seconds);
}

void JointSwapReference::Drop() {
  if (joint_ == nullptr || ForkCount() != fork_count_) return;
  const GilRelease release;
  joint_->Drop();
}

void BindJointSwapping(nb::module_& m, nb::class_<PoolReference>& pool) {
  nb::class_<JointSwapReference>(m, "JointSwapped")
      .def(nb::init<nb::list>(), "parts"_a)
      .def_prop_ro("parts", &JointSwapReference::parts)
      // Same meaning as in Swapped.
      .def_prop_ro("slot", [](const JointSwapReference& s) { return s.joint().parts()[0]->slot; })
      .def_prop_ro("length", [](const JointSwapReference& s) { return s.joint().tokens(); })
      .def_prop_ro("queued",
                   [](const JointSwapReference& s) { return s.joint().parts()[0]->state() == SwapState::kQueued; })
      .def_prop_ro("gone", [](const JointSwapReference& s) { return s.joint().gone(); })
      .def_prop_ro("stored", [](const JointSwapReference& s) { return s.joint().stored(); })
      .def_prop_ro("place", [](const JointSwapReference& s) { return s.first().store()->place(); })
      .def(
          "wait",
          [](const JointSwapReference& s, double seconds) {
            s.joint();
            const GilRelease release;
            return s.Wait(seconds);
          },
          "seconds"_a)
      .def_prop_ro("tokens", [](const JointSwapReference& s) { return s.joint().tokens_in_memory(); })
      .def_prop_ro("error", [](const JointSwapReference& s) { return s.joint().error(); })
      .def("drop", &JointSwapReference::Drop)
      .def(
          "cancel_read",
          [](const JointSwapReference& s, std::size_t part) {
            JointSwap& joint = s.joint();
            const GilRelease release;
            joint.CancelRead(part);
          },
          "part"_a);
  pool.def(
      "start_read",
      [](const PoolReference& self, const JointSwapReference& swapped, std::size_t part) {
        JointSwap& joint = swapped.joint();
        return Call(self, "prefetch", [&](const PoolPtr&) { return joint.StartRead(part); });
      },
      "swapped"_a, "part"_a);
}

}  // namespace kvpage
