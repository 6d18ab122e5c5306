#include "python/swap_binding.h"

#include <nanobind/stl/string.h>

#include <string>

#include "python/host_store_binding.h"
#include "python/store_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {

std::shared_ptr<store::SwapStore> SwapReference::store() const {
  if (auto host = ToHostStore(store_); host != nullptr) return host;
  return ToStore(store_);
}

bool SwapReference::Wait(double seconds) const {
  if (swap_->Wait(seconds)) return true;
  // A closed store no longer polls for what programs on a device have done.
  if (const PoolPtr pool = pool_.lock(); pool != nullptr && pool->CheckProcess("swap_in").ok()) pool->ContinueSwaps();
  return swap_->Wait(0);
}

Status SwapReference::Check(const char* op, const PoolPtr& pool) const {
  if (swap_ == nullptr || pool_.lock() != pool) {
    return InvalidArgument(std::string(op) + ": swapped: this sequence was not swapped out of this pool");
  }
  return {};
}

void SwapReference::Drop() {
  if (swap_ == nullptr || joined_) return;
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
      .def_prop_ro("stored", [](const SwapReference& s) { return s.swap()->state() == SwapState::kStored; })
      .def_prop_ro("place", [](const SwapReference& s) { return s.store()->place(); })
      // A ticket: waits up to some seconds; returns whether it is ready, and with how many tokens, or why not with all.
      .def(
          "wait",
          [](const SwapReference& s, double seconds) {
            const GilRelease release;
            return s.Wait(seconds);
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
