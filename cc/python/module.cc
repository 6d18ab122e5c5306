// The nanobind module jax_kvpage._native: the pool object, the handler capsules, and what the build knows of itself.
//
// The GIL is released around everything that may take the pool's locks or call the system.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "cache/registry.h"
#include "ffi/handlers.h"
#include "kernels/cpu/kernels.h"
#include "python/cuda_binding.h"
#include "python/pool_handle.h"
#include "vmm/limits.h"
#ifdef KVPAGE_TESTING  // defined by CMake in a build with JAX_KVPAGE_TESTING
#include "python/testing_binding.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {

#ifdef KVPAGE_CUDA_ARCHITECTURES  // defined by CMake in a build with CUDA
#define KVPAGE_CUDA_BUILT KVPAGE_CUDA_ARCHITECTURES
#else
#define KVPAGE_CUDA_BUILT ""
std::vector<Target> CudaTargets() { return {}; }
#endif

namespace {

// The failed status of a host call: Python sees (code name, message) and chooses the exception.
class StatusError : public std::runtime_error {
 public:
  explicit StatusError(const Status& status) : std::runtime_error(status.message()), code(status.code()) {}
  Code code;
};

void Raise(const Status& status) {
  if (!status.ok()) throw StatusError(status);
}

// Zero-copy array over the keys (kv 0) or values (1) of one layer: [max_seq_len, heads, dim] of a slot, or
// [max_slots, max_seq_len, heads, dim]. Holds the memory, and the slot's view pin, while it lives.
nb::ndarray<nb::array_api> View(PoolHandle& self, std::int64_t layer, int kv, std::int32_t slot) {
  std::shared_ptr<PoolView> view;
  {
    nb::gil_scoped_release release;
    Raise(self.View(layer, slot, &view));
  }
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
  nb::capsule owner(new std::shared_ptr<PoolView>(std::move(view)),
                    [](void* p) noexcept { delete static_cast<std::shared_ptr<PoolView>*>(p); });
  return nb::ndarray<nb::array_api>(data, shape.size(), shape.data(), owner, nullptr, dtype, nb::device::cpu::value, 0);
}

nb::dict Registrations(const std::string& platform) {
  nb::dict result;
  for (const Target& target : platform == "cuda" ? CudaTargets() : CpuTargets()) {
    result[target.name] = nb::capsule(reinterpret_cast<void*>(target.handler), "xla._CUSTOM_CALL_TARGET");
  }
  return result;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled part of jax_kvpage: pools, XLA FFI handlers and CPU kernels. Internal.";
  // Pools may outlive the interpreter by design (programs in flight at exit).
  nb::set_leak_warnings(false);

  const nb::exception<StatusError> status_error(m, "StatusError", PyExc_RuntimeError);
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void* type) {
        try {
          std::rethrow_exception(p);
        } catch (const StatusError& error) {
          nb::object exception = nb::handle(static_cast<PyObject*>(type))(static_cast<int>(error.code), error.what());
          PyErr_SetObject(static_cast<PyObject*>(type), exception.ptr());
        }
      },
      nb::object(m.attr("StatusError")).ptr());

  Raise(cpu::CheckInstructionSet());
  m.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("CUDA_ARCHITECTURES") = KVPAGE_CUDA_BUILT;
  m.def("registrations", &Registrations, "platform"_a = "cpu");
  m.def("instruction_set", &cpu::InstructionSet);
  m.def("memory_limit_bytes", [] { return MemoryLimitBytes(); });
  m.def("available_bytes", [] { return AvailableBytes(); });

  BindCuda(m);
#ifdef KVPAGE_TESTING
  BindTesting(m);
#endif
  nb::class_<Claim>(m, "Claim")
      .def_prop_ro("code", [](const Claim& c) { return static_cast<int>(c.status.code()); })
      .def_prop_ro("message", [](const Claim& c) { return c.status.message(); })
      .def_ro("slots", &Claim::slots)
      .def_ro("out_of_slots", &Claim::out_of_slots)
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
      .def_ro("blocks_shared", &PoolNumbers::blocks_shared)
      .def_ro("blocks_peak", &PoolNumbers::blocks_peak)
      .def_ro("blocks_warm", &PoolNumbers::blocks_warm)
      .def_ro("slots_occupied", &PoolNumbers::slots_occupied)
      .def_ro("slots_draining", &PoolNumbers::slots_draining)
      .def_ro("slots_parked", &PoolNumbers::slots_parked)
      .def_ro("block_bytes", &PoolNumbers::block_bytes)
      .def_ro("virtual_bytes", &PoolNumbers::virtual_bytes)
      .def_ro("physical_bytes", &PoolNumbers::physical_bytes)
      .def_ro("system_calls", &PoolNumbers::system_calls)
      .def_ro("waits", &PoolNumbers::waits);

  nb::class_<SlotRow>(m, "SlotRow")
      .def_ro("slot", &SlotRow::slot)
      .def_prop_ro("draining", [](const SlotRow& r) { return r.state == SlotState::kDraining; })
      .def_ro("blocks", &SlotRow::blocks)
      .def_ro("reserved", &SlotRow::reserved)
      .def_ro("committed", &SlotRow::committed)
      .def_ro("length", &SlotRow::length);

  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<PoolHandle>(m, "Pool")
      .def(
          "__init__",
          [](PoolHandle* self, const SpecInts& spec, std::int64_t block_bytes, std::int64_t capacity_bytes,
             bool allow_stale, bool poison, const std::string& backend, int device) {
            new (self) PoolHandle;
            Raise(self->Open(spec, block_bytes, capacity_bytes, {allow_stale, poison}, backend, device));
          },
          "spec"_a, "block_bytes"_a, "capacity_bytes"_a, "allow_stale"_a, "poison"_a, "backend"_a = "cpu",
          "device"_a = 0)
      .def_prop_ro("id", &PoolHandle::id)
      .def_prop_ro("closed", &PoolHandle::closed)
      .def(
          "acquire", [](PoolHandle& s, const std::vector<std::int64_t>& n) { return s.Acquire(n); }, Release(),
          "num_tokens"_a)
      .def(
          "extend",
          [](PoolHandle& s, const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& n) {
            return s.Extend(slots, n);
          },
          Release(), "slots"_a, "num_tokens"_a)
      .def(
          "start_release", [](PoolHandle& s, const std::vector<std::int32_t>& slots) { Raise(s.StartRelease(slots)); },
          Release(), "slots"_a)
      .def("undo_acquire", &PoolHandle::UndoAcquire, Release(), "slots"_a)
      .def("undo_release", &PoolHandle::UndoRelease, Release(), "slots"_a)
      .def(
          "commit", [](PoolHandle& s, std::int32_t slot, std::int64_t n) { Raise(s.Commit(slot, n)); }, Release(),
          "slot"_a, "num_tokens"_a)
      .def(
          "new_generation",
          [](PoolHandle& s) {
            Pool::Generation generation;
            Raise(s.NewGeneration(&generation));
            return std::make_tuple(generation.generation, generation.epoch, generation.lengths);
          },
          Release())
      .def(
          "wait_for_drain", [](PoolHandle& s, double seconds) { return s.WaitForDrain(seconds); }, Release(),
          "seconds"_a)
      .def(
          "trim",
          [](PoolHandle& s) {
            std::int64_t blocks = 0;
            Raise(s.Trim(&blocks));
            return blocks;
          },
          Release())
      .def(
          "resize", [](PoolHandle& s, std::int64_t bytes) { return s.Resize(bytes); }, Release(), "capacity_bytes"_a)
      .def(
          "numbers",
          [](PoolHandle& s) {
            PoolNumbers numbers;
            Raise(s.Numbers(&numbers));
            return numbers;
          },
          Release())
      .def(
          "rows",
          [](PoolHandle& s) {
            std::vector<SlotRow> rows;
            Raise(s.Rows(&rows));
            return rows;
          },
          Release())
      .def(
          "block_map",
          [](PoolHandle& s, std::int32_t slot) {
            std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>> map;
            Raise(s.BlockMap(slot, &map));
            return map;
          },
          Release(), "slot"_a)
      .def("view", &View, "layer"_a, "kv"_a, "slot"_a)
      .def(
          "take_fault", [](PoolHandle& s) { Raise(s.TakeFault()); }, Release())
      .def("close", &PoolHandle::Close, Release());
}

}  // namespace kvpage
