#include "python/store_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "python/host_store_binding.h"
#include "store/block_file.h"
#include "store/block_store.h"
#include "store/host_tier.h"
#include "store/inspect.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpage {
namespace {

using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A store whose calls wait without holding the GIL.
class Store {
 public:
  Store(const std::string& path, std::int64_t limit_bytes, std::string fingerprint) {
    const GilRelease release;
    store::StoreOptions options;
    options.limit_bytes = limit_bytes;
    options.fingerprint = std::move(fingerprint);
    std::unique_ptr<store::BlockStore> opened;
    Raise(store::BlockStore::Open(path, std::move(options), &opened));
    store_ = std::move(opened);
  }
  ~Store() {
    const GilRelease release;
    if (store_ != nullptr) store_->Close();
    store_.reset();
  }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  store::BlockStore* get() const { return store_.get(); }
  const std::shared_ptr<store::BlockStore>& shared() const { return store_; }
  void Close() {
    const GilRelease release;
    store_->Close();
  }
  void Refresh() {
    const GilRelease release;
    Raise(store_->Refresh());
  }
  store::StoreNumbers Numbers() {
    const GilRelease release;
    Raise(store_->Check("stats"));
    return store_->Numbers();
  }

 private:
  std::shared_ptr<store::BlockStore> store_;  // also held by calls in progress in other threads
};

// Nonzero counts by the name of the problem.
nb::dict ByProblem(const std::vector<std::int64_t>& counts) {
  nb::dict result;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] != 0) result[Name(static_cast<store::Problem>(i))] = counts[i];
  }
  return result;
}

prefix::Saved SavePrefixes(const PoolReference& self, Store& store, const std::string& space,
                           const std::vector<Ids>& ids, bool all) {
  prefix::SaveRequest request{all, space, {}};
  for (const Ids& each : ids) request.ids.emplace_back(each.data(), each.data() + each.size());
  prefix::Saved saved;
  WaitOn(self, "save_prefixes", [&](const PoolPtr& pool, const GoOn& go_on) {
    return pool->SavePrefixes(store.get(), request, go_on, &saved);
  });
  return saved;
}

prefix::Loaded LoadPrefixes(const PoolReference& self, Store& store) {
  prefix::Loaded loaded;
  WaitOn(self, "load_prefixes",
         [&](const PoolPtr& pool, const GoOn& go_on) { return pool->LoadPrefixes(store.get(), go_on, &loaded); });
  return loaded;
}

void AttachStore(const PoolReference& self, const nb::object& object, double write_ahead) {
  std::shared_ptr<store::PrefixStore> below;
  if (const std::shared_ptr<store::HostStore> host = ToHostStore(object); host != nullptr) {
    Raise(host->Check("KVPool"));
    below = std::make_shared<store::HostTier>(host);
  } else {
    below = ToStore(object);
  }
  Call(self, "KVPool", [&](const PoolPtr& pool) { return pool->AttachStore(below, write_ahead); });
}

std::shared_ptr<prefix::FetchTicket> Prefetch(const PoolReference& self, std::string space, const Ids& ids,
                                              double prefill_rate) {
  const prefix::FetchRequest request = {std::move(space), {ids.data(), ids.data() + ids.size()}, prefill_rate};
  std::shared_ptr<prefix::FetchTicket> ticket;
  Call(self, "prefetch", [&](const PoolPtr& pool) { return pool->Prefetch(request, &ticket); });
  return ticket;
}

std::vector<store::FileReport> ListFiles(const std::string& path, bool verify) {
  const GilRelease release;
  std::vector<store::FileReport> reports;
  Raise(store::ListFiles(path, verify, &reports));
  return reports;
}

std::vector<std::string> Prune(const std::string& path, std::int64_t limit_bytes, double used_before) {
  const GilRelease release;
  std::vector<std::string> removed;
  Raise(store::Prune(path, limit_bytes, used_before, &removed));
  return removed;
}

void BindInspection(nb::module_& m) {
  using store::FileReport;
  nb::class_<FileReport>(m, "StoreFile")
      .def_ro("name", &FileReport::name)
      .def_ro("bytes", &FileReport::bytes)
      .def_ro("used", &FileReport::used)
      .def_prop_ro("problem", [](const FileReport& r) { return std::string(Name(r.problem)); })
      .def_prop_ro("layout", [](const FileReport& r) { return r.header.identity.shape.layout; })
      .def_prop_ro("fingerprint", [](const FileReport& r) { return r.header.identity.fingerprint; })
      .def_prop_ro("space", [](const FileReport& r) { return r.header.identity.space; })
      .def_prop_ro("block_tokens", [](const FileReport& r) { return r.header.identity.shape.block_tokens; })
      .def_prop_ro("first_block", [](const FileReport& r) { return r.header.first_block; })
      .def_prop_ro("tokens", [](const FileReport& r) { return r.header.tokens; });
  m.def("store_files", &ListFiles, "path"_a, "verify"_a);
  m.def("store_prune", &Prune, "path"_a, "limit_bytes"_a, "used_before"_a);
  m.def(
      "store_checksum",
      [](const nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& bytes) {
        const GilRelease release;
        const auto* const range = reinterpret_cast<const char*>(bytes.data());
        return store::Checksum({"", 1, 1, static_cast<std::int64_t>(bytes.size())}, &range);
      },
      "bytes"_a);
}

void BindTier(nb::module_& m, nb::class_<PoolReference>& pool) {
  using prefix::FetchTicket;
  using prefix::TierNumbers;
  nb::class_<FetchTicket>(m, "FetchTicket")
      .def(
          "wait",
          [](const FetchTicket& ticket, double seconds) {
            const GilRelease release;
            return ticket.Wait(seconds);
          },
          "seconds"_a)
      .def_prop_ro("tokens", &FetchTicket::tokens)
      .def_prop_ro("error", &FetchTicket::error);
  nb::class_<TierNumbers>(m, "TierNumbers")
      .def_ro("queries", &TierNumbers::queries)
      .def_ro("memory_hits", &TierNumbers::memory_hits)
      .def_ro("store_hits", &TierNumbers::store_hits)
      .def_prop_ro("tokens_written", [](const TierNumbers& n) { return n.spills.tokens; })
      .def_prop_ro("bytes_written", [](const TierNumbers& n) { return n.spills.bytes; })
      .def_prop_ro("write_seconds", [](const TierNumbers& n) { return n.spills.seconds; })
      .def_prop_ro("failed_writes", [](const TierNumbers& n) { return n.spills.failed; })
      .def_ro("unwritten_evictions", &TierNumbers::unwritten_evictions)
      .def_prop_ro("prefetches", [](const TierNumbers& n) { return n.fetches.requests; })
      .def_prop_ro("tokens_fetched", [](const TierNumbers& n) { return n.fetches.tokens; })
      .def_prop_ro("bytes_fetched", [](const TierNumbers& n) { return n.fetches.bytes; })
      .def_prop_ro("fetch_seconds", [](const TierNumbers& n) { return n.fetches.seconds; })
      .def_prop_ro("longest_fetch_seconds", [](const TierNumbers& n) { return n.fetches.longest_seconds; })
      .def_prop_ro("fetch_seconds_median", [](const TierNumbers& n) { return n.fetches.latencies.median; })
      .def_prop_ro("fetch_seconds_p95", [](const TierNumbers& n) { return n.fetches.latencies.p95; })
      .def_prop_ro("write_seconds_median", [](const TierNumbers& n) { return n.spills.latencies.median; })
      .def_prop_ro("write_seconds_p95", [](const TierNumbers& n) { return n.spills.latencies.p95; })
      .def_prop_ro("missed", [](const TierNumbers& n) { return n.fetches.missed; })
      .def_ro("read_bytes_per_second", &TierNumbers::read_bytes_per_second);
  pool.def("attach_store", &AttachStore, "store"_a, "write_ahead"_a)
      .def("prefetch", &Prefetch, "space"_a, "ids"_a, "prefill_rate"_a)
      .def(
          "stored_prefix",
          [](const PoolReference& self, const std::string& space, const Ids& ids) {
            const prefix::TokenIds tokens(ids.data(), ids.data() + ids.size());
            std::int64_t stored = 0;
            Call(self, "stored_prefix", [&](const PoolPtr& p) { return p->StoredPrefix(space, tokens, &stored); });
            return stored;
          },
          "space"_a, "ids"_a)
      .def("tier_numbers", Method("spill_stats", &Pool::StoreNumbers));
}

}  // namespace

std::shared_ptr<store::BlockStore> ToStore(nb::handle object) { return nb::cast<Store&>(object).shared(); }

void BindStore(nb::module_& m, nb::class_<PoolReference>& pool) {
  BindTier(m, pool);
  using Numbers = store::StoreNumbers;
  nb::class_<Numbers>(m, "StoreNumbers")
      .def_ro("files", &Numbers::files)
      .def_ro("bytes", &Numbers::bytes)
      .def_ro("bytes_swapped", &Numbers::bytes_swapped)
      .def_ro("read_bytes_per_second", &Numbers::read_bytes_per_second)
      .def_ro("limit_bytes", &Numbers::limit_bytes)
      .def_ro("bytes_written", &Numbers::bytes_written)
      .def_ro("bytes_read", &Numbers::bytes_read)
      .def_ro("failed_writes", &Numbers::failed_writes)
      .def_ro("files_evicted", &Numbers::files_evicted)
      .def_ro("bytes_evicted", &Numbers::bytes_evicted)
      .def_prop_ro("refused", [](const Numbers& n) { return ByProblem(n.refused); })
      .def_prop_ro("missed", [](const Numbers& n) { return ByProblem(n.missed); })
      .def_prop_ro("swap_out_seconds_median", [](const Numbers& n) { return n.swap_outs.median; })
      .def_prop_ro("swap_out_seconds_p95", [](const Numbers& n) { return n.swap_outs.p95; })
      .def_prop_ro("swap_in_seconds_median", [](const Numbers& n) { return n.swap_ins.median; })
      .def_prop_ro("swap_in_seconds_p95", [](const Numbers& n) { return n.swap_ins.p95; })
      .def_ro("last_error", &Numbers::last_error);
  nb::class_<Store>(m, "Store")
      .def(nb::init<const std::string&, std::int64_t, std::string>(), "path"_a, "limit_bytes"_a, "fingerprint"_a)
      .def("close", &Store::Close)
      .def("refresh", &Store::Refresh)
      .def("numbers", &Store::Numbers);
  nb::class_<prefix::Saved>(m, "Saved")
      .def_ro("tokens", &prefix::Saved::tokens)
      .def_ro("written", &prefix::Saved::written);
  nb::class_<prefix::Loaded>(m, "Loaded")
      .def_ro("tokens", &prefix::Loaded::tokens)
      .def_ro("present", &prefix::Loaded::present)
      .def_ro("no_room", &prefix::Loaded::no_room)
      .def_ro("lost", &prefix::Loaded::lost);
  BindInspection(m);
  pool.def("save_prefixes", &SavePrefixes, "store"_a, "space"_a, "ids"_a, "all"_a)
      .def("load_prefixes", &LoadPrefixes, "store"_a);
}

}  // namespace kvpage
