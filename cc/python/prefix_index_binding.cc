#include "python/prefix_index_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cache/prefix_index.h"
#include "cache/prefix_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

using Int32s = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Blocks = nb::ndarray<nb::numpy, std::int32_t, nb::ndim<1>>;

// Returns physical blocks as an array, so that they need not become Python numbers.
Blocks ToArray(std::vector<std::int32_t> blocks) {
  auto* const kept = new std::vector<std::int32_t>(std::move(blocks));
  const nb::capsule owner(kept, [](void* data) noexcept { delete static_cast<std::vector<std::int32_t>*>(data); });
  return Blocks(kept->data(), {kept->size()}, owner);
}

std::int64_t Size(const Int32s& values) { return static_cast<std::int64_t>(values.size()); }

PrefixPolicy ToPolicy(const std::string& name) {
  if (name == "frequency") return PrefixPolicy::kFrequency;
  if (name == "lru") return PrefixPolicy::kLru;
  if (name == "segmented_lru") return PrefixPolicy::kSegmentedLru;
  throw nb::value_error("policy must be 'frequency', 'lru' or 'segmented_lru'");
}

// An index that checks the preconditions that C++ callers guarantee.
class Index {
 public:
  Index(std::int64_t block_tokens, std::int64_t ranges, const std::string& policy)
      : block_tokens_(Positive(block_tokens)),
        ranges_(Positive(ranges)),
        index_(block_tokens, ranges, ToPolicy(policy)) {
    Namespace("");
  }

  std::int32_t Namespace(const std::string& name) {
    const std::int32_t space = index_.Namespace(name);
    num_spaces_ = std::max(num_spaces_, space + 1);
    return space;
  }
  PrefixMatch Find(const Int32s& tokens, std::int32_t space) const {
    return index_.Find(Known(space), tokens.data(), Size(tokens));
  }
  void Touch(const Int32s& tokens, std::int32_t space) { index_.Touch(Known(space), tokens.data(), Size(tokens)); }
  Blocks Store(std::int32_t slot, const Int32s& tokens, const Int32s& map, std::int32_t space) {
    if (Size(map) < (Size(tokens) + block_tokens_ - 1) / block_tokens_ * ranges_) {
      throw nb::value_error("map must name a block for each range and logical block of the tokens");
    }
    if (slot < 0) throw nb::value_error("slot must not be negative");
    std::vector<std::int32_t> referenced;
    index_.Store(slot, Known(space), tokens.data(), Size(tokens), map.data(), &referenced);
    return ToArray(std::move(referenced));
  }
  std::int64_t Tokens(std::int32_t slot) const { return index_.Tokens(slot); }
  Blocks Cut(std::int32_t slot, std::int64_t tokens, std::int64_t keep_blocks) {
    std::vector<std::int32_t> dropped;
    index_.Cut(slot, tokens, keep_blocks, &dropped);
    return ToArray(std::move(dropped));
  }
  void Detach(std::int32_t slot) { index_.Detach(slot); }
  // As if only the index referred to blocks, and all owners were live.
  Blocks Evict(std::int64_t enough) {
    std::int64_t freed;
    std::vector<std::int32_t> dropped;
    const auto count = [&](const std::int32_t*, std::int32_t owner) { return owner < 0 ? ranges_ : -1; };
    index_.Evict(index_.PlanEviction(enough, count, &freed), &dropped);
    return ToArray(std::move(dropped));
  }
  void Hint(const Int32s& tokens, const std::string& hint, std::int32_t space) {
    if (hint != "retain" && hint != "drop") throw nb::value_error("hint must be 'retain' or 'drop'");
    index_.Hint(Known(space), tokens.data(), Size(tokens), hint == "drop" ? PrefixHint::kDrop : PrefixHint::kRetain);
  }
  std::int64_t Pin(const Int32s& tokens, std::int64_t most_entries, double expires, std::int32_t space) {
    return index_.Pin(Known(space), tokens.data(), Size(tokens), PinOptions{most_entries, expires});
  }
  void Unpin(const Int32s& tokens, std::int32_t space) { index_.Unpin(Known(space), tokens.data(), Size(tokens)); }
  void ExpirePins(double now) { index_.ExpirePins(now); }
  void RecordEvents(std::int64_t most) {
    if (most < 0) throw nb::value_error("most must not be negative");
    index_.RecordEvents(most);
  }
  std::vector<PrefixEvent> TakeEvents() { return index_.TakeEvents(); }
  // (namespace, entry, its parent, its tokens)
  using Entry = std::tuple<std::int32_t, std::int32_t, std::int32_t, std::vector<std::int32_t>>;
  std::vector<Entry> Entries() const {
    std::vector<Entry> entries;
    index_.ForEach([&](std::int32_t space, std::int32_t entry, std::int32_t parent, const std::int32_t* tokens,
                       std::int64_t count) {
      entries.emplace_back(space, entry, parent, std::vector<std::int32_t>(tokens, tokens + count));
    });
    return entries;
  }
  PrefixNumbers Numbers() const { return index_.numbers(); }

 private:
  static std::int64_t Positive(std::int64_t value) {
    if (value < 1) throw nb::value_error("block_tokens and ranges must be positive");
    return value;
  }
  std::int32_t Known(std::int32_t space) const {
    if (space < 0 || space >= num_spaces_) throw nb::index_error("no such namespace");
    return space;
  }

  const std::int64_t block_tokens_, ranges_;
  std::int32_t num_spaces_ = 0;
  PrefixIndex index_;
};

const char* KindName(const PrefixEvent& event) {
  switch (event.kind) {
    case PrefixEvent::Kind::kStored:
      return "stored";
    case PrefixEvent::Kind::kRemoved:
      return "removed";
    case PrefixEvent::Kind::kCleared:
      break;
  }
  return "cleared";
}

}  // namespace

void BindPrefixIndex(nb::module_& m) {
  nb::class_<PrefixMatch>(m, "PrefixMatch")
      .def_ro("tokens", &PrefixMatch::tokens)
      .def_ro("blocks", &PrefixMatch::blocks)
      .def_ro("owners", &PrefixMatch::owners)
      .def_ro("behind", &PrefixMatch::behind)
      .def_ro("leaf", &PrefixMatch::leaf);
  nb::class_<PrefixNumbers>(m, "PrefixNumbers")
      .def_ro("entries", &PrefixNumbers::entries)
      .def_ro("tokens", &PrefixNumbers::tokens)
      .def_ro("evictions", &PrefixNumbers::evictions)
      .def_ro("pinned", &PrefixNumbers::pinned);
  nb::class_<PrefixEvent>(m, "PrefixEvent")
      .def_prop_ro("kind", &KindName)
      .def_ro("hash", &PrefixEvent::hash)
      .def_ro("space", &PrefixEvent::space)
      .def_ro("parent", &PrefixEvent::parent)
      .def_ro("tokens", &PrefixEvent::tokens);
  nb::class_<prefix::EventList>(m, "PrefixEvents")
      .def_ro("events", &prefix::EventList::events)
      .def_ro("spaces", &prefix::EventList::spaces);
  constexpr std::int64_t kNoCap = std::numeric_limits<std::int64_t>::max();
  constexpr double kNever = std::numeric_limits<double>::infinity();
  nb::class_<Index>(m, "PrefixIndex")
      .def(nb::init<std::int64_t, std::int64_t, const std::string&>(), "block_tokens"_a, "ranges"_a = 1,
           "policy"_a = "frequency")
      .def("namespace", &Index::Namespace, "name"_a)
      .def("find", &Index::Find, "tokens"_a, "space"_a = 0)
      .def("touch", &Index::Touch, "tokens"_a, "space"_a = 0)
      .def("store", &Index::Store, "slot"_a, "tokens"_a, "map"_a, "space"_a = 0)
      .def("tokens", &Index::Tokens, "slot"_a)
      .def("cut", &Index::Cut, "slot"_a, "tokens"_a, "keep_blocks"_a = 0)
      .def("detach", &Index::Detach, "slot"_a)
      .def("evict", &Index::Evict, "enough"_a)
      .def("hint", &Index::Hint, "tokens"_a, "hint"_a, "space"_a = 0)
      .def("pin", &Index::Pin, "tokens"_a, "most_entries"_a = kNoCap, "expires"_a = kNever, "space"_a = 0)
      .def("unpin", &Index::Unpin, "tokens"_a, "space"_a = 0)
      .def("expire_pins", &Index::ExpirePins, "now"_a)
      .def("record_events", &Index::RecordEvents, "most"_a)
      .def("take_events", &Index::TakeEvents)
      .def("entries", &Index::Entries)
      .def_prop_ro("numbers", &Index::Numbers);
}

}  // namespace kvpage
