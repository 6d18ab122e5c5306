#include "python/handover_binding.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

HandoverReference Receive(const std::vector<int>& descriptors) {
  HandoverReference received;
  Raise(handover::Receive(descriptors, &received.handover));
  return received;
}

std::vector<int> Filenos(const HandoverReference& h) {
  std::vector<int> descriptors = {h.handover->file->fd()};
  for (const Fd& handle : h.handover->handles) descriptors.push_back(handle.get());
  return descriptors;
}

HandoverReference ExportBlocks(const PoolReference& self, std::int32_t slot, const std::string& fingerprint) {
  HandoverReference exported;
  WaitOn(self, "export_blocks", [&](const PoolPtr& pool, const GoOn& go_on) {
    return pool->ExportBlocks(slot, fingerprint, go_on, &exported.handover);
  });
  return exported;
}

}  // namespace

void BindHandover(nb::module_& m, nb::class_<PoolReference>& pool) {
  nb::class_<HandoverReference>(m, "Handover")
      .def_static("receive", &Receive, "descriptors"_a)
      .def_prop_ro("closed", [](const HandoverReference& h) { return h.handover == nullptr; })
      .def("close", [](HandoverReference& h) { h.handover = nullptr; })
      // Must not be called on a closed hand-over; the same for the properties.
      .def("filenos", &Filenos)
      .def_prop_ro("token_ids", [](const HandoverReference& h) { return h.handover->header.ids; })
      .def_prop_ro("num_tokens", [](const HandoverReference& h) { return h.handover->header.tokens; })
      .def_prop_ro("num_bytes",
                   [](const HandoverReference& h) {
                     const handover::Header& header = h.handover->header;
                     return header.blocks * header.ranges * header.block_bytes;
                   })
      .def_prop_ro("fingerprint", [](const HandoverReference& h) { return h.handover->header.fingerprint; })
      .def_prop_ro("copied", [](const HandoverReference& h) { return h.handover->copied; });
  pool.def("export_blocks", &ExportBlocks, "slot"_a, "fingerprint"_a);
}

}  // namespace kvpage
