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

#include "cache/messages.h"
#include "cache/pool.h"
#include "cache/process.h"
#include "cache/registry.h"
#include "python/errors.h"
#include "python/gil.h"
#include "python/open_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

using PoolPtr = std::shared_ptr<Pool>;

// Keeps a pool for ever: in a forked child its end could wait for a lock that nobody holds any more.
void Leak(PoolPtr pool) { static_cast<void>(new PoolPtr(std::move(pool))); }

// For each range of a slot (physical block, references) of each logical block.
using BlockMap = std::vector<std::vector<std::pair<std::int32_t, std::int32_t>>>;

// The Python object's reference to its pool, until it is closed.
class PoolReference {
 public:
  explicit PoolReference(OpenedPool opened)
      : id_(opened.pool->id()), memory_(std::move(opened.memory)), pool_(std::move(opened.pool)) {}
  ~PoolReference() {
    static_cast<void>(Close({}));
    if (!here()) Leak(std::move(pool_));
  }
  PoolReference(const PoolReference&) = delete;
  PoolReference& operator=(const PoolReference&) = delete;

  std::int32_t id() const { return id_; }
  const MemoryLimit& memory() const { return memory_; }
  bool closed() const { return closed_.load(); }
  // The open pool of this process. In a forked child no lock is taken: another thread may have held it at the fork.
  Status Get(const char* op, PoolPtr* out) const {
    if (!here()) return closed() ? messages::Closed(op, id_) : Pool::OtherProcess(op, id_);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed()) return messages::Closed(op, id_);
    *out = pool_;
    return {};
  }
  // Waits for running handlers. Programs queued behind it fail and name the pool. Safe to call again.
  Status Close(const GoOn& go_on) {
    if (!here()) return {};
    PoolPtr pool;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      pool = pool_;
    }
    if (pool == nullptr) return {};
    KVPAGE_RETURN_IF_ERROR(pool->Close(go_on));
    Unregister(id_);
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.reset();  // `pool` ends after the lock
    return {};
  }

 private:
  bool here() const { return ForkCount() == fork_count_; }

  const int fork_count_ = ForkCount();
  const std::int32_t id_;
  const MemoryLimit memory_;
  std::atomic<bool> closed_{false};
  mutable std::mutex mutex_;
  PoolPtr pool_;
};

// Calls fn(pool) without the GIL, on an open pool of this process; a failed status becomes a StatusError. `op` begins
// the messages.
template <class Fn>
auto Call(const PoolReference& self, const char* op, Fn&& fn) {
  const GilRelease release;
  PoolPtr pool;
  Raise(self.Get(op, &pool));
  if constexpr (std::is_same_v<decltype(fn(pool)), Status>) {
    Raise(fn(pool));
  } else {
    return fn(pool);
  }
}

// Calls wait(go_on), which waits for programs, without the GIL. An exception of a signal handler ends the wait.
template <class Wait>
void Interruptibly(Wait&& wait) {
  Status status;
  bool interrupted = false;
  {
    GilRelease release;
    status = wait([&] { return !(interrupted = !release.CheckSignals()); });
  }
  if (interrupted) throw nb::python_error();
  Raise(status);
}

// As Interruptibly, with an open pool of this process.
template <class Wait>
void WaitOn(const PoolReference& self, const char* op, Wait&& wait) {
  Interruptibly([&](const GoOn& go_on) -> Status {
    PoolPtr pool;
    KVPAGE_RETURN_IF_ERROR(self.Get(op, &pool));
    return wait(pool, go_on);
  });
}

// A method of the pool as a method of the Python object.
template <class Result, class... Args>
auto Method(const char* op, Result (Pool::*method)(Args...)) {
  return [op, method](const PoolReference& self, const std::decay_t<Args>&... args) {
    return Call(self, op, [&](const PoolPtr& pool) { return (pool.get()->*method)(args...); });
  };
}

// The same for a method whose last parameter takes the result, Status (Args..., Out*).
template <class Out, class... Args, class PoolMethod>
auto Getter(const char* op, PoolMethod method) {
  return [op, method](const PoolReference& self, const std::decay_t<Args>&... args) {
    Out out{};
    Call(self, op, [&](const PoolPtr& pool) { return (pool.get()->*method)(args..., &out); });
    return out;
  };
}

// While it lives the arena stays mapped and the slot is not handed on.
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

// Zero-copy array over the keys (kv 0) or values (1) of one layer: [max_seq_len, heads, dim] of a slot, or
// [max_slots, max_seq_len, heads, dim]. Holds the memory, and the slot's view pin, while it lives.
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

// (opcode, slot, length)
using EditRows = std::vector<std::array<std::int32_t, 3>>;

std::vector<SlotEdit> ToEdits(const EditRows& rows) {
  std::vector<SlotEdit> edits;
  for (const auto& [opcode, slot, length] : rows) edits.push_back({opcode, slot, length});
  return edits;
}

// The edits that the host has decided about in one call and that a program is to make. The caller has it before the
// decision is made: a Python signal handler may raise when a call returns, and its result is lost then.
struct Decision {
  EditRows edits;
};

Claim Acquire(const PoolReference& self, Decision* decision, const std::vector<std::int64_t>& tokens) {
  return Call(self, "acquire", [&](const PoolPtr& pool) {
    Claim claim = pool->Acquire(tokens);
    for (const std::int32_t slot : claim.slots) {
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kOccupy), slot, 0});
    }
    return claim;
  });
}

void StartEdits(const PoolReference& self, Decision* decision, const std::string& verb, const EditRows& rows) {
  Call(self, verb.c_str(), [&](const PoolPtr& pool) -> Status {
    KVPAGE_RETURN_IF_ERROR(pool->StartEdits(verb.c_str(), ToEdits(rows)));
    decision->edits.insert(decision->edits.end(), rows.begin(), rows.end());
    return {};
  });
}

// Takes a decision back; a pool that was closed meanwhile has nothing to take back.
void Undo(const PoolReference& self, Decision* decision) {
  const GilRelease release;
  PoolPtr pool;
  const EditRows rows = std::move(decision->edits);
  decision->edits.clear();
  if (self.Get("undo", &pool).ok()) pool->UndoEdits(ToEdits(rows));
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
      .def_ro("length", &SlotRow::length)
      .def_ro("views", &SlotRow::views)
      .def_ro("vacated", &SlotRow::vacated);

  nb::class_<Decision>(m, "Decision").def(nb::init<>()).def_ro("edits", &Decision::edits);
}

}  // namespace

void BindPool(nb::module_& m) {
  BindResults(m);
  nb::class_<PoolReference>(m, "Pool")
      .def(
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
      // Decisions of the host, and their undo where the caller does not come to know of them.
      .def("acquire", &Acquire, "decision"_a, "num_tokens"_a)
      .def("can_acquire", Method("can_acquire", &Pool::CanAcquire), "num_tokens"_a)
      .def("start_edits", &StartEdits, "decision"_a, "verb"_a, "edits"_a)
      .def("undo", &Undo, "decision"_a)
      // Calls that queue nothing.
      .def("extend", Method("extend", &Pool::Extend), "slots"_a, "num_tokens"_a)
      .def("commit", Method("commit", &Pool::Commit), "slot"_a, "token_ids"_a)
      .def("committed", Method("committed", &Pool::Committed), "slot"_a)
      .def("new_generation",
           [](const PoolReference& self) {
             Pool::Generation made;
             WaitOn(self, "cache",
                    [&](const PoolPtr& pool, const GoOn& go_on) { return pool->NewGeneration(&made, go_on); });
             return std::make_tuple(made.generation, made.epoch, made.lengths);
           })
      .def("wait_for_drain", Method("acquire", &Pool::WaitForDrain), "seconds"_a)
      .def("trim", Getter<std::int64_t>("trim", &Pool::Trim))
      .def("resize", &Resize, "capacity_bytes"_a)
      .def("take_fault", Method("check", &Pool::TakeFault))
      .def("take_warning", Method("check", &Pool::TakeWarning))
      .def("numbers", Method("stats", &Pool::Numbers))
      .def("rows", Method("slot_table", &Pool::Rows))
      .def("block_map", Getter<BlockMap, std::int32_t>("block_map", &Pool::BlockMap), "slot"_a)
      .def("view", &View, "layer"_a, "kv"_a, "slot"_a);
}

}  // namespace kvpage
