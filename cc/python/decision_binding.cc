#include "python/decision_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "python/handover_binding.h"
#include "python/swap_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

// (opcode, slot, length, donor)
using EditRows = std::vector<std::array<std::int32_t, 4>>;

std::vector<SlotEdit> ToEdits(const EditRows& rows) {
  std::vector<SlotEdit> edits;
  for (const auto& [opcode, slot, length, donor] : rows) edits.push_back({opcode, slot, length, donor});
  return edits;
}

// The edits that the host has decided on in one call, and that a program is to make. The caller creates this object
// before the decision is made: a Python signal handler may raise when a call returns, and the call's result would be
// lost.
struct Decision {
  EditRows edits;
  std::vector<reuse::Mark> marks;  // reuse_segment
  SwapPtr swapped_out, swapped_in;
  std::int32_t imported = -1;  // slot
};

Claim Acquire(const PoolReference& self, Decision* decision, const std::vector<std::int64_t>& tokens) {
  return Call(self, "acquire", [&](const PoolPtr& pool) {
    Claim claim = pool->Acquire(tokens);
    for (const std::int32_t slot : claim.slots) {
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kOccupy), slot, 0, -1});
    }
    return claim;
  });
}

Claim AcquireHandover(const PoolReference& self, Decision* decision, const std::vector<std::int64_t>& tokens) {
  return Call(self, "acquire", [&](const PoolPtr& pool) {
    Claim claim = pool->AcquireHandover(tokens);
    for (const std::int32_t slot : claim.slots) {
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kOccupy), slot, 0, -1});
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

// Undoes a decision once; does nothing if the pool has been closed.
void Undo(const PoolReference& self, Decision* decision) {
  const GilRelease release;
  PoolPtr pool;
  const EditRows rows = std::exchange(decision->edits, {});
  const std::vector<reuse::Mark> marks = std::exchange(decision->marks, {});
  const SwapPtr swapped_out = std::exchange(decision->swapped_out, nullptr);
  const SwapPtr swapped_in = std::exchange(decision->swapped_in, nullptr);
  if (!self.Get("undo", &pool).ok()) return;
  pool->UndoEdits(ToEdits(rows));
  pool->UndoReuse(marks);
  if (swapped_out != nullptr) pool->DropSwapped(swapped_out);
  if (swapped_in != nullptr) pool->UndoSwapIn(swapped_in, rows.front()[1]);
  if (decision->imported >= 0) pool->UndoImport(std::exchange(decision->imported, -1));
}

// (donor, tokens)
using ForkRows = std::vector<std::pair<std::int32_t, std::int64_t>>;

Claim Fork(const PoolReference& self, Decision* decision, const std::string& verb, const ForkRows& rows,
           const std::vector<std::int32_t>& released) {
  std::vector<ForkRequest> requests;
  for (const auto& [donor, tokens] : rows) requests.push_back({donor, tokens});
  return Call(self, verb.c_str(), [&](const PoolPtr& pool) {
    Claim claim = pool->Fork(verb.c_str(), requests, released);
    if (!claim.status.ok()) return claim;
    for (const std::int32_t slot : released) {
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0, -1});
    }
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const auto tokens = static_cast<std::int32_t>(claim.tokens[i]);  // at most max_seq_len
      decision->edits.push_back(
          {static_cast<std::int32_t>(SlotOpcode::kFork), claim.slots[i], tokens, requests[i].donor});
    }
    return claim;
  });
}

using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Claim AcquirePrefix(const PoolReference& self, Decision* decision, const std::vector<Ids>& ids,
                    const std::vector<std::int64_t>& tokens, const std::string& space, bool whole, std::int64_t unit,
                    std::int64_t least) {
  std::vector<prefix::Request> requests;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    requests.push_back({{ids[i].data(), ids[i].data() + ids[i].size()}, tokens[i]});
  }
  const prefix::Options options = {space, whole, unit, least};
  return Call(self, "acquire_prefix", [&](const PoolPtr& pool) {
    Claim claim = pool->AcquirePrefix(requests, options);
    for (std::size_t i = 0; i < claim.slots.size(); ++i) {
      if (claim.slots[i] < 0) continue;
      const auto found = static_cast<std::int32_t>(claim.tokens[i]);  // at most max_seq_len
      const SlotOpcode opcode = claim.sources[i] >= 0 ? SlotOpcode::kFork
                                : found > 0           ? SlotOpcode::kFound
                                                      : SlotOpcode::kOccupy;
      decision->edits.push_back({static_cast<std::int32_t>(opcode), claim.slots[i], found, claim.sources[i]});
    }
    return claim;
  });
}

Claim Truncate(const PoolReference& self, Decision* decision, const std::vector<std::int32_t>& slots,
               const std::vector<std::int64_t>& tokens) {
  return Call(self, "truncate", [&](const PoolPtr& pool) {
    Claim claim = pool->Truncate(slots, tokens);
    for (std::size_t i = 0; i < claim.slots.size(); ++i) {
      const auto length = static_cast<std::int32_t>(tokens[i]);
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kTruncate), slots[i], length, -1});
    }
    return claim;
  });
}

void DropBefore(const PoolReference& self, Decision* decision, const std::vector<std::int32_t>& slots,
                const std::vector<std::int64_t>& tokens, std::int32_t generation, std::uint32_t epoch) {
  Call(self, "drop_before", [&](const PoolPtr& pool) -> Status {
    std::vector<std::int64_t> dropped;
    KVPAGE_RETURN_IF_ERROR(pool->DropBefore(slots, tokens, &dropped, {generation, epoch}));
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (dropped[i] == 0) continue;
      const auto begin = static_cast<std::int32_t>(dropped[i]);  // at most max_seq_len
      decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kDrop), slots[i], begin, -1});
    }
    return {};
  });
}

// (source, target, begin, count)
using SegmentRows = std::vector<std::array<std::int32_t, 4>>;

// The rows of the program's operand: the given ones, each with the target's committed tokens.
std::vector<std::array<std::int32_t, 5>> StartReuse(const PoolReference& self, Decision* decision,
                                                    const SegmentRows& rows) {
  std::vector<SegmentCopy> copies;
  for (const auto& [source, target, begin, count] : rows) copies.push_back({source, target, begin, count, 0});
  Call(self, "reuse_segment", [&](const PoolPtr& pool) { return pool->StartReuse(&copies, &decision->marks); });
  std::vector<std::array<std::int32_t, 5>> operand;
  for (const SegmentCopy& c : copies) operand.push_back({c.source, c.target, c.begin, c.count, c.committed});
  return operand;
}

void SwapOut(const PoolReference& self, Decision* decision, SwapReference& swapped, std::int32_t slot) {
  const std::shared_ptr<store::SwapStore> store = swapped.store();
  Call(self, "swap_out", [&](const PoolPtr& pool) -> Status {
    KVPAGE_RETURN_IF_ERROR(pool->SwapOut(slot, store, &decision->swapped_out));
    swapped.Set(pool, decision->swapped_out);
    decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0, -1});
    return {};
  });
}

Claim SwapIn(const PoolReference& self, Decision* decision, const SwapReference& swapped, bool recover) {
  return Call(self, "swap_in", [&](const PoolPtr& pool) {
    if (Status status = swapped.Check("swap_in", pool); !status.ok()) return FailedClaim(status);
    Claim claim = pool->SwapIn(swapped.swap(), recover);
    if (!claim.status.ok()) return claim;
    decision->swapped_in = swapped.swap();
    const auto tokens = static_cast<std::int32_t>(claim.tokens[0]);  // at most max_seq_len
    const auto shared = static_cast<std::int32_t>(claim.shared[0]);
    decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], tokens, shared});
    return claim;
  });
}

Claim ImportBlocks(const PoolReference& self, Decision* decision, const HandoverReference& received,
                   const std::string& fingerprint) {
  return Call(self, "import_blocks", [&](const PoolPtr& pool) {
    if (received.handover == nullptr) return FailedClaim(InvalidArgument("import_blocks: the handover is closed"));
    Claim claim = pool->ImportBlocks(*received.handover, fingerprint);
    if (!claim.status.ok()) return claim;
    decision->imported = claim.slots[0];
    const auto tokens = static_cast<std::int32_t>(claim.tokens[0]);  // at most max_seq_len
    decision->edits.push_back({static_cast<std::int32_t>(SlotOpcode::kSwapIn), claim.slots[0], tokens,
                               static_cast<std::int32_t>(claim.shared[0])});
    return claim;
  });
}

}  // namespace

void BindDecisions(nb::module_& m, nb::class_<PoolReference>& pool) {
  nb::class_<Decision>(m, "Decision").def(nb::init<>()).def_ro("edits", &Decision::edits);
  pool
      // Decisions of the host, and undoing them if the caller never learns of them.
      .def("acquire", &Acquire, "decision"_a, "num_tokens"_a)
      .def("can_acquire", Method("can_acquire", &Pool::CanAcquire), "num_tokens"_a)
      .def("fork", &Fork, "decision"_a, "verb"_a, "requests"_a, "released"_a)
      .def("acquire_prefix", &AcquirePrefix, "decision"_a, "ids"_a, "num_tokens"_a, "space"_a, "whole"_a, "unit"_a,
           "least"_a)
      .def("truncate", &Truncate, "decision"_a, "slots"_a, "num_tokens"_a)
      .def("shares_behind", Getter<bool, std::int32_t, std::int64_t>("truncate", &Pool::SharesBehind), "slot"_a,
           "num_tokens"_a)
      .def("drop_before", &DropBefore, "decision"_a, "slots"_a, "num_tokens"_a, "generation"_a, "epoch"_a)
      .def("drops", Getter<bool, std::int32_t, std::int64_t>("drop_before", &Pool::Drops), "slot"_a, "num_tokens"_a)
      .def("start_reuse", &StartReuse, "decision"_a, "copies"_a)
      .def("swap_out", &SwapOut, "decision"_a, "swapped"_a, "slot"_a)
      .def("swap_in", &SwapIn, "decision"_a, "swapped"_a, "recover"_a)
      .def("acquire_handover", &AcquireHandover, "decision"_a, "num_tokens"_a)
      .def("import_blocks", &ImportBlocks, "decision"_a, "handover"_a, "fingerprint"_a)
      .def("start_edits", &StartEdits, "decision"_a, "verb"_a, "edits"_a)
      .def("undo", &Undo, "decision"_a);
}

}  // namespace kvpage
