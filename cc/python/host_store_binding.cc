#include "python/host_store_binding.h"

#include <nanobind/stl/string.h>

#include <cstdint>

#include "python/errors.h"
#include "python/gil.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

// A store whose calls wait without holding the GIL.
class HostStoreReference {
 public:
  explicit HostStoreReference(std::int64_t limit_bytes) : store_(std::make_shared<store::HostStore>(limit_bytes)) {}
  ~HostStoreReference() {
    const GilRelease release;
    store_->Close();  // ends its threads first: none of them may drop the last reference
    store_.reset();
  }
  HostStoreReference(const HostStoreReference&) = delete;
  HostStoreReference& operator=(const HostStoreReference&) = delete;

  const std::shared_ptr<store::HostStore>& shared() const { return store_; }
  void Close() {
    const GilRelease release;
    store_->Close();
  }
  store::HostNumbers Numbers() {
    const GilRelease release;
    Raise(store_->Check("stats"));
    return store_->Numbers();
  }

 private:
  std::shared_ptr<store::HostStore> store_;  // also held by calls in progress in other threads
};

}  // namespace

std::shared_ptr<store::HostStore> ToHostStore(nb::handle object) {
  return nb::isinstance<HostStoreReference>(object) ? nb::cast<HostStoreReference&>(object).shared() : nullptr;
}

void BindHostStore(nb::module_& m) {
  using Numbers = store::HostNumbers;
  using Prefixes = store::HostPrefixNumbers;
  nb::class_<Prefixes>(m, "HostPrefixNumbers")
      .def_ro("runs", &Prefixes::runs)
      .def_ro("bytes", &Prefixes::bytes)
      .def_ro("bytes_written", &Prefixes::bytes_written)
      .def_ro("bytes_read", &Prefixes::bytes_read)
      .def_ro("read_bytes_per_second", &Prefixes::read_bytes_per_second)
      .def_ro("bytes_evicted", &Prefixes::bytes_evicted)
      .def_ro("refused_writes", &Prefixes::refused_writes)
      .def_ro("failed_writes", &Prefixes::failed_writes)
      .def_ro("failed_reads", &Prefixes::failed_reads)
      .def_ro("last_error", &Prefixes::last_error);
  nb::class_<Numbers>(m, "HostNumbers")
      .def_ro("limit_bytes", &Numbers::limit_bytes)
      .def_ro("used_bytes", &Numbers::used_bytes)
      .def_ro("pinned_bytes", &Numbers::pinned_bytes)
      .def_ro("bytes_written", &Numbers::bytes_written)
      .def_ro("bytes_read", &Numbers::bytes_read)
      .def_ro("read_bytes_per_second", &Numbers::read_bytes_per_second)
      .def_ro("refused_writes", &Numbers::refused_writes)
      .def_ro("failed_writes", &Numbers::failed_writes)
      .def_ro("failed_reads", &Numbers::failed_reads)
      .def_ro("last_error", &Numbers::last_error)
      .def_prop_ro("swap_out_seconds_median", [](const Numbers& n) { return n.swap_outs.median; })
      .def_prop_ro("swap_out_seconds_p95", [](const Numbers& n) { return n.swap_outs.p95; })
      .def_prop_ro("swap_in_seconds_median", [](const Numbers& n) { return n.swap_ins.median; })
      .def_prop_ro("swap_in_seconds_p95", [](const Numbers& n) { return n.swap_ins.p95; })
      .def_ro("prefixes", &Numbers::prefixes);
  nb::class_<HostStoreReference>(m, "HostStore")
      .def(nb::init<std::int64_t>(), "limit_bytes"_a)
      .def("numbers", &HostStoreReference::Numbers)
      .def("close", &HostStoreReference::Close);
}

}  // namespace kvpage
