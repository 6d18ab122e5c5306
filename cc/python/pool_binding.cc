#include "python/pool_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "python/decision_binding.h"
#include "python/handover_binding.h"
#include "python/host_store_binding.h"
#include "python/joint_swap_binding.h"
#include "python/pool_reference.h"
#include "python/store_binding.h"
#include "python/swap_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

// An array converts faster than a list.
using TokenArray = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

prefix::TokenIds ToIds(const TokenArray& ids) { return {ids.data(), ids.data() + ids.size()}; }

// While it exists, the arena stays mapped and the slot is not reused.
struct PoolView {
  PoolView(PoolPtr p, std::int32_t s) : pool(std::move(p)), slot(s) {}
  ~PoolView() {
    if (pool->CheckProcess("view").ok()) {
      pool->RemoveView(slot);
    } else {
      Leak(std::move(pool));
    }
  }
  PoolView(const PoolView&) = delete;
  PoolView& operator=(const PoolView&) = delete;
  PoolPtr pool;
  const std::int32_t slot;
};

// A zero-copy array over the keys (kv = 0) or values (kv = 1) of one layer: [max_seq_len, heads, dim] for a slot, or
// [max_slots, max_seq_len, heads, dim]. Holds the memory, and the slot's view pin, while it exists.
nb::ndarray<nb::array_api> View(const PoolReference& self, std::int64_t layer, int kv, std::int32_t slot) {
  std::unique_ptr<PoolView> view;
  WaitOn(self, "view", [&](const PoolPtr& pool, const GoOn& go_on) -> Status {
    KVPAGE_RETURN_IF_ERROR(pool->AddView(layer, slot, go_on));
    view = std::make_unique<PoolView>(pool, slot);
    return {};
  });
  const Geometry& g = view->pool->geometry();
  const KVView strides = view->pool->View();
  void* data = strides.Chunk(slot < 0 ? 0 : slot, 0, layer, kv);
  std::vector<std::size_t> shape;
  if (slot < 0) shape.push_back(static_cast<std::size_t>(g.max_slots));
  for (std::int64_t n : {g.max_seq_len, g.num_kv_heads, g.head_dim}) shape.push_back(static_cast<std::size_t>(n));
  const bool bf16 = g.dtype == DType::kBF16;
  const nb::dlpack::dtype dtype{
      static_cast<std::uint8_t>(bf16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float),
      static_cast<std::uint8_t>(8 * ItemSize(g.dtype)), 1};
  nb::capsule owner(view.release(), [](void* p) noexcept { delete static_cast<PoolView*>(p); });
  return nb::ndarray<nb::array_api>(data, shape.size(), shape.data(), owner, nullptr, dtype, nb::device::cpu::value, 0);
}

Claim Resize(const PoolReference& self, std::int64_t capacity_bytes) {
  return Call(self, "resize", [&](const PoolPtr& pool) {
    Claim claim;
    claim.status = self.memory().Check("resize", capacity_bytes);
    return claim.status.ok() ? pool->Resize(capacity_bytes) : claim;
  });
}

void BindResults(nb::module_& m) {
  nb::class_<Claim>(m, "Claim")
      .def_prop_ro("ok", [](const Claim& c) { return c.status.ok(); })
      .def_prop_ro("code", [](const Claim& c) { return c.status.code(); })
      .def_prop_ro("reason", [](const Claim& c) { return c.status.reason(); })
      .def_prop_ro("message", [](const Claim& c) { return c.status.message(); })
      .def_ro("slots", &Claim::slots)
      .def_ro("tokens", &Claim::tokens)
      .def_ro("shared", &Claim::shared)
      .def_ro("sources", &Claim::sources)
      .def_ro("leaders", &Claim::leaders)
      .def_ro("stored", &Claim::stored)
      .def_ro("wanted", &Claim::wanted)
      .def_ro("free", &Claim::free)
      .def_ro("draining", &Claim::draining)
      .def_ro("reclaimable", &Claim::reclaimable);

  nb::class_<PoolNumbers>(m, "PoolNumbers")
      .def_ro("blocks_total", &PoolNumbers::blocks_total)
      .def_ro("blocks_mapped", &PoolNumbers::blocks_mapped)
      .def_ro("blocks_parked", &PoolNumbers::blocks_parked)
      .def_ro("blocks_draining", &PoolNumbers::blocks_draining)
      .def_ro("blocks_free", &PoolNumbers::blocks_free)
      .def_ro("blocks_spare", &PoolNumbers::blocks_spare)
      .def_ro("blocks_shared", &PoolNumbers::blocks_shared)
      .def_ro("blocks_cached", &PoolNumbers::blocks_cached)
      .def_ro("prefix_queries", &PoolNumbers::prefix_queries)
      .def_ro("prefix_hits", &PoolNumbers::prefix_hits)
      .def_ro("prefix_tokens", &PoolNumbers::prefix_tokens)
      .def_ro("prefix_evictions", &PoolNumbers::prefix_evictions)
      .def_ro("sequences_swapped", &PoolNumbers::sequences_swapped)
      .def_ro("blocks_swapped", &PoolNumbers::blocks_swapped)
      .def_prop_ro("swapped_out", [](const PoolNumbers& n) { return n.swaps.swapped_out; })
      .def_prop_ro("swapped_in", [](const PoolNumbers& n) { return n.swaps.swapped_in; })
      .def_prop_ro("bytes_swapped_out", [](const PoolNumbers& n) { return n.swaps.bytes_swapped_out; })
      .def_prop_ro("bytes_swapped_in", [](const PoolNumbers& n) { return n.swaps.bytes_swapped_in; })
      .def_ro("blocks_received", &PoolNumbers::blocks_received)
      .def_prop_ro("exported", [](const PoolNumbers& n) { return n.handovers.exported; })
      .def_prop_ro("imported", [](const PoolNumbers& n) { return n.handovers.imported; })
      .def_prop_ro("bytes_copied_out", [](const PoolNumbers& n) { return n.handovers.bytes_copied_out; })
      .def_prop_ro("bytes_copied_in", [](const PoolNumbers& n) { return n.handovers.bytes_copied_in; })
      .def_ro("blocks_peak", &PoolNumbers::blocks_peak)
      .def_ro("blocks_warm", &PoolNumbers::blocks_warm)
      .def_ro("slots_occupied", &PoolNumbers::slots_occupied)
      .def_ro("slots_draining", &PoolNumbers::slots_draining)
      .def_ro("slots_parked", &PoolNumbers::slots_parked)
      .def_ro("block_bytes", &PoolNumbers::block_bytes)
      .def_ro("virtual_bytes", &PoolNumbers::virtual_bytes)
      .def_ro("physical_bytes", &PoolNumbers::physical_bytes)
      .def_ro("system_calls", &PoolNumbers::system_calls)
      .def_ro("waits", &PoolNumbers::waits)
      .def_ro("memory_mappings", &PoolNumbers::memory_mappings);

  nb::class_<SlotRow>(m, "SlotRow")
      .def_ro("slot", &SlotRow::slot)
      .def_prop_ro("draining", [](const SlotRow& r) { return r.state == SlotState::kDraining; })
      .def_ro("blocks", &SlotRow::blocks)
      .def_ro("shared", &SlotRow::shared)
      .def_ro("reserved", &SlotRow::reserved)
      .def_ro("committed", &SlotRow::committed)
      .def_ro("length", &SlotRow::length)
      .def_ro("views", &SlotRow::views)
      .def_ro("vacated", &SlotRow::vacated)
      .def_ro("dropped", &SlotRow::dropped);
  nb::class_<relocation::Report>(m, "RelocationReport")
      .def_ro("blocks_moved", &relocation::Report::blocks_moved)
      .def_ro("bytes_copied", &relocation::Report::bytes_copied)
      .def_ro("mappings_before", &relocation::Report::mappings_before)
      .def_ro("mappings_after", &relocation::Report::mappings_after)
      .def_ro("huge_pages", &relocation::Report::huge_pages)
      .def_ro("huge_refused", &relocation::Report::huge_refused);
  nb::class_<BlockRow>(m, "BlockRow")
      .def_ro("block", &BlockRow::block)
      .def_ro("references", &BlockRow::references)
      .def_ro("owner", &BlockRow::owner)
      .def_ro("slots", &BlockRow::slots);
}

}  // namespace

void BindPool(nb::module_& m) {
  BindResults(m);
  nb::class_<PoolReference> pool(m, "Pool");
  BindDecisions(m, pool);
  BindStore(m, pool);
  BindHostStore(m);
  BindSwapping(m, pool);
  BindJointSwapping(m, pool);
  BindHandover(m, pool);
  pool.def(
          "__init__",
          [](PoolReference* self, const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes,
             bool allow_stale, bool poison, bool debug, const std::string& backend, int device) {
            OpenedPool opened;
            Raise(OpenPool(spec, block_bytes, capacity_bytes, {allow_stale, poison, debug}, backend, device, &opened));
            new (self) PoolReference(std::move(opened));
          },
          "spec"_a, "block_bytes"_a, "capacity_bytes"_a, "allow_stale"_a, "poison"_a, "debug"_a, "backend"_a = "cpu",
          "device"_a = 0)
      .def_prop_ro("id", &PoolReference::id)
      .def_prop_ro("closed", &PoolReference::closed)
      .def("close", [](PoolReference& self) { Interruptibly([&](const GoOn& go_on) { return self.Close(go_on); }); })
      // Calls that queue no program.
      .def(
          "find_prefix",
          [](const PoolReference& self, const std::string& space, const TokenArray& ids, bool whole) {
            return Getter<std::int64_t, std::string, prefix::TokenIds, bool>("find_prefix", &Pool::FindPrefix)(
                self, space, ToIds(ids), whole);
          },
          "space"_a, "ids"_a, "whole"_a)
      .def(
          "pin",
          [](const PoolReference& self, const std::string& space, const TokenArray& ids, double share, double seconds) {
            return Getter<std::int64_t, std::string, prefix::TokenIds, double, double>("pin", &Pool::Pin)(
                self, space, ToIds(ids), share, seconds);
          },
          "space"_a, "ids"_a, "share"_a, "seconds"_a)
      .def(
          "unpin",
          [](const PoolReference& self, const std::string& space, const TokenArray& ids) {
            Method("unpin", &Pool::Unpin)(self, space, ToIds(ids));
          },
          "space"_a, "ids"_a)
      .def(
          "hint",
          [](const PoolReference& self, const std::string& space, const TokenArray& ids, bool retain) {
            Method("hint", &Pool::Hint)(self, space, ToIds(ids), retain ? PrefixHint::kRetain : PrefixHint::kDrop);
          },
          "space"_a, "ids"_a, "retain"_a)
      .def("evict", Getter<std::int64_t, std::int64_t>("evict", &Pool::Evict), "blocks"_a)
      .def("events", Getter<prefix::EventList>("events", &Pool::PrefixEvents))
      .def("extend", Method("extend", &Pool::Extend), "slots"_a, "num_tokens"_a)
      .def("commit", Method("commit", &Pool::Commit), "slot"_a, "token_ids"_a)
      .def("retract", Method("retract", &Pool::Retract), "slot"_a, "reserved"_a, "committed"_a)
      .def("committed", Method("committed", &Pool::Committed), "slot"_a)
      .def("new_generation",
           [](const PoolReference& self) {
             Pool::Generation made;
             WaitOn(self, "cache",
                    [&](const PoolPtr& pool, const GoOn& go_on) { return pool->NewGeneration(&made, go_on); });
             return std::make_tuple(made.generation, made.epoch, made.lengths);
           })
      .def("swap_writes", Method("acquire", &Pool::SwapWrites))
      .def("wait_for_drain", Method("acquire", &Pool::WaitForDrain), "seconds"_a)
      .def("trim", Getter<std::int64_t>("trim", &Pool::Trim))
      .def("resize", &Resize, "capacity_bytes"_a)
      .def(
          "relocate",
          [](const PoolReference& self, std::int64_t most_bytes, bool everything,
             const std::vector<std::int32_t>& slots, bool huge_pages) {
            return Getter<relocation::Report, relocation::Options>("relocate", &Pool::Relocate)(
                self, {most_bytes, everything, slots, huge_pages});
          },
          "most_bytes"_a, "everything"_a, "slots"_a, "huge_pages"_a)
      .def("take_fault", Method("check", &Pool::TakeFault))
      .def("untold_fault", Method("close", &Pool::UntoldFault))
      .def("take_warning", Method("check", &Pool::TakeWarning))
      .def("numbers", Method("stats", &Pool::Numbers))
      .def("audit", Method("audit", &Pool::Audit))  // for tests
      .def("rows", Method("slot_table", &Pool::Rows))
      .def("block_map", Getter<BlockReferences, std::int32_t>("block_map", &Pool::BlockMap), "slot"_a)
      .def("memory_ranges", Getter<MemoryRanges, std::int32_t>("memory_ranges", &Pool::SlotMemory), "slot"_a)
      .def("block_owners", Getter<BlockRows, std::int32_t>("block_map", &Pool::BlockOwners), "slot"_a)
      .def("view", &View, "layer"_a, "kv"_a, "slot"_a);
}

}  // namespace kvpage
