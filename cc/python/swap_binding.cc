#include "python/swap_binding.h"

#include <nanobind/stl/string.h>

#include <string>

#include "python/store_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {

std::shared_ptr<store::BlockStore> SwapReference::store() const { return ToStore(store_); }

Status SwapReference::Check(const char* op, const PoolPtr& pool) const {
  if (swap_ == nullptr || pool_.lock() != pool) {
    return InvalidArgument(std::string(op) + ": swapped: this sequence was not swapped out of this pool");
  }
  return {};
}

void SwapReference::Drop() {
  if (swap_ == nullptr) return;
  const GilRelease release;
  PoolPtr pool = pool_.lock();
  if (pool == nullptr) return;
  if (pool->CheckProcess("drop_swapped").ok()) {
    pool->DropSwapped(swap_);
  } else {
    Leak(std::move(pool));
  }
}

void BindSwapping(nb::module_& m, nb::class_<PoolReference>& pool) {
  nb::class_<SwapReference>(m, "Swapped")
      .def(nb::init<nb::object>(), "store"_a)
      .def_prop_ro("slot", [](const SwapReference& s) { return s.swap()->slot; })
      .def_prop_ro("length", [](const SwapReference& s) { return s.swap()->tokens(); })
      .def_prop_ro("queued", [](const SwapReference& s) { return s.swap()->state() == SwapState::kQueued; })
      .def_prop_ro("gone", [](const SwapReference& s) { return s.swap()->state() == SwapState::kGone; })
      .def_prop_ro("on_disk", [](const SwapReference& s) { return s.swap()->state() == SwapState::kDisk; })
      // A ticket: whether it is ready within some seconds, and with how many tokens, or why not all.
      .def(
          "wait",
          [](const SwapReference& s, double seconds) {
            const GilRelease release;
            return s.swap()->Wait(seconds);
          },
          "seconds"_a)
      .def_prop_ro("tokens", [](const SwapReference& s) { return s.swap()->tokens_in_memory(); })
      .def_prop_ro("error", [](const SwapReference& s) { return s.swap()->error(); })
      .def("drop", &SwapReference::Drop);
  pool.def(
      "prefetch_swapped",
      [](const PoolReference& self, const SwapReference& swapped) {
        return Call(self, "prefetch", [&](const PoolPtr& p) {
          Status status = swapped.Check("prefetch", p);
          return status.ok() ? p->Prefetch(swapped.swap()) : FailedClaim(status);
        });
      },
      "swapped"_a);
}

}  // namespace kvpage
