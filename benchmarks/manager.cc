// What the manager of a large pool costs the host: its decisions for one decode step, without a model and without
// memory.
//
//   kvpage_manager [--devices N] [--slots N] [--steps N]
//
// A pool for each device gets the same calls, as a KVPool over a mesh makes them. Page tables only count the calls that
// they would make, so that sizes can be tried which no machine at hand has. Prints one JSON object; times are processor
// time of the calling thread, in microseconds a step.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache/pool.h"
#include "vmm/vmm.h"

namespace kvpage {
namespace {

// In tokens: a prompt, whose first part is one of a few common ones, and an answer.
constexpr std::int32_t kPrompt = 512, kCommon = 256, kAnswer = 128, kBlock = 16;
constexpr std::int64_t kBlockBytes = std::int64_t{2} << 20;

void Check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

double Microseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

// A page table without pages.
class CountingVmm final : public Vmm {
 public:
  explicit CountingVmm(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    void* const range = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) Check(ResourceExhausted("no virtual memory for a pool"));
    base_ = static_cast<char*>(range);
  }
  ~CountingVmm() override { munmap(base_, bytes_); }

  char* base() const override { return base_; }
  Status Window(char**) override { return {Code::kUnimplemented, "there is no memory"}; }
  Status Grow(std::int64_t) override { return {}; }
  Status Create(const std::int32_t*, std::int64_t count) override { return Count(count); }
  Status Destroy(const std::int32_t*, std::int64_t count) override { return Count(count); }
  Status Map(std::int64_t, const std::int32_t*, std::int64_t count) override { return Count(count); }
  Status Remap(std::int64_t, const std::int32_t*, const std::int32_t*, std::int64_t count) override {
    return Count(count);
  }
  Status Copy(const std::int32_t*, const std::int32_t*, std::int64_t) override { return {}; }
  Status Unmap(std::int64_t, const std::int32_t*, std::int64_t count) override { return Count(count); }
  Status Fill(std::int64_t, std::int64_t, int) override { return {}; }
  std::int64_t PhysicalBytes() const override { return 0; }
  std::int64_t system_calls() const override { return calls_; }

 private:
  Status Count(std::int64_t blocks) {
    calls_ += blocks;
    return {};
  }

  const std::size_t bytes_;
  char* base_ = nullptr;
  std::int64_t calls_ = 0;
};

// The pool of one device, with the programs that run there.
class Shard {
 public:
  Shard(const Geometry& geometry, std::int64_t blocks) {
    auto vmm = std::make_unique<CountingVmm>(geometry.virtual_bytes());
    vmm_ = vmm.get();
    Check(Pool::Make(geometry, blocks * geometry.block_bytes, {}, std::move(vmm), nullptr, &pool_));
    Pool::Generation generation;
    Check(pool_->NewGeneration(&generation));
    generation_ = generation.generation;
    epoch_ = generation.epoch;
    lengths_ = generation.lengths;
  }

  Pool& pool() { return *pool_; }
  std::int64_t calls() const { return vmm_->system_calls(); }

  void Edit(const char* op, SlotOpcode opcode, const std::vector<std::int32_t>& slots,
            const std::vector<std::int64_t>& lengths, const std::vector<std::int32_t>& donors = {}) {
    std::vector<SlotEdit> edits;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const bool fork = !donors.empty() && donors[i] >= 0;
      edits.push_back({static_cast<std::int32_t>(fork ? SlotOpcode::kFork : opcode), slots[i],
                       static_cast<std::int32_t>(lengths[i]), fork ? donors[i] : -1});
    }
    PinnedSlots pinned;
    Check(pool_->EditSlots(op, Cache(), {edits.data(), static_cast<std::int64_t>(edits.size()), nullptr, 0}, &pinned,
                           &epoch_, lengths_.data()));
  }

  // A step that writes `counts[i]` tokens of slots[i].
  void Step(const std::vector<std::int32_t>& slots, const std::vector<std::int32_t>& counts) {
    std::vector<std::int32_t> offsets = {0};
    for (const std::int32_t count : counts) offsets.push_back(offsets.back() + count);
    const BatchRef batch = {slots.data(), static_cast<std::int64_t>(slots.size()), offsets.data(), offsets.back()};
    {
      PinnedSlots pinned;
      Check(pool_->Begin("append_kv", Cache(), batch, 0, true, &pinned));
      epoch_ = pinned.epoch();
    }
    Check(pool_->Advance("advance", Cache(), batch, &epoch_, lengths_.data()));
  }

 private:
  CacheRef Cache() const { return {generation_, epoch_, lengths_.data()}; }

  CountingVmm* vmm_;
  std::shared_ptr<Pool> pool_;
  std::int32_t generation_;
  std::uint32_t epoch_;
  std::vector<std::int32_t> lengths_;
};

struct Running {
  std::int32_t slot, length;
};

class Simulation {
 public:
  Simulation(int devices, std::int32_t slots) : slots_(slots) {
    // One layer of one head stands for what a device holds: a block has 2 MiB, as on a GPU.
    constexpr std::int64_t kDim = kBlockBytes / (kBlock * 2 * 4);
    Geometry geometry;
    Check(Geometry::Make({1, 1, kDim, slots, 1024, 0, static_cast<std::int64_t>(Layout::kFused), kBlock}, kBlockBytes,
                         &geometry));
    const std::int64_t blocks = std::int64_t{slots} * (kPrompt + kAnswer) / kBlock;
    for (int i = 0; i < devices; ++i) shards_.push_back(std::make_unique<Shard>(geometry, blocks));
    // Requests that began one after the other, so that in each step some end.
    while (static_cast<std::int32_t>(running_.size()) < slots_) Admit(Share(), nullptr);
    for (std::size_t i = 0; i < running_.size(); ++i) {
      const auto count = static_cast<std::int32_t>(i % kAnswer);
      Extend({running_[i].slot}, {running_[i].length + count}, nullptr);
      if (count > 0) Run({running_[i].slot}, {count});
      running_[i].length += count;
    }
  }

  // Some requests end, others begin, and each running one gets a token.
  void Step(std::map<std::string, double>* times) {
    std::vector<std::int32_t> done, grown, all, ones(running_.size(), 1);
    std::vector<std::int64_t> tokens;
    std::vector<Running> left;
    for (const Running& one : running_) {
      if (one.length < kPrompt + kAnswer) {
        left.push_back(one);
      } else {
        done.push_back(one.slot);
      }
    }
    running_ = std::move(left);
    for (const auto& shard : shards_) {
      std::vector<SlotEdit> edits;
      for (const std::int32_t slot : done) edits.push_back({static_cast<std::int32_t>(SlotOpcode::kVacate), slot, 0});
      Timed(times, "release", [&] { Check(shard->pool().StartEdits("release", edits)); });
      shard->Edit("release", SlotOpcode::kVacate, done, std::vector<std::int64_t>(done.size()));
    }
    const auto free = static_cast<std::int32_t>(done.size());
    if (free > 0) Admit(free, times);
    for (const Running& one : running_) {
      all.push_back(one.slot);
      if (one.length % kBlock != 0) continue;
      grown.push_back(one.slot);
      tokens.push_back(one.length + 1);
    }
    Extend(grown, tokens, times);
    ones.resize(all.size());
    Run(all, ones);
    // What a request has generated is committed when a block is full.
    const std::vector<std::int32_t> ids(kBlock, 1);
    for (const auto& shard : shards_) {
      Timed(times, "commit", [&] {
        for (const Running& one : running_) {
          if ((one.length + 1) % kBlock == 0) Check(shard->pool().Commit(one.slot, ids));
        }
      });
    }
    for (Running& one : running_) ++one.length;
  }

  std::int64_t calls() const { return shards_.front()->calls(); }

 private:
  std::int32_t Share() const { return std::max<std::int32_t>(slots_ / kAnswer, 1); }

  template <class Fn>
  static void Timed(std::map<std::string, double>* times, const char* name, const Fn& fn) {
    const double begin = Microseconds();
    fn();
    if (times != nullptr) (*times)[name] += Microseconds() - begin;
  }

  void Run(const std::vector<std::int32_t>& slots, const std::vector<std::int32_t>& counts) {
    for (const auto& shard : shards_) shard->Step(slots, counts);
  }

  void Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens,
              std::map<std::string, double>* times) {
    for (const auto& shard : shards_) {
      Timed(times, "extend", [&] { Check(shard->pool().Extend(slots, tokens).status); });
    }
  }

  void Admit(std::int32_t count, std::map<std::string, double>* times) {
    std::vector<prefix::Request> requests;
    for (std::int32_t i = 0; i < count; ++i, ++last_) {
      prefix::Request request;
      request.ids.assign(kPrompt, last_);
      std::fill_n(request.ids.begin(), kCommon, (1 << 30) + last_ % 16);
      request.tokens = kPrompt;
      requests.push_back(std::move(request));
    }
    prefix::Options options;
    options.followers = false;
    Claim claim;
    for (const auto& shard : shards_) {
      Timed(times, "acquire_prefix", [&] { claim = shard->pool().AcquirePrefix(requests, options); });
      Check(claim.status);
      shard->Edit("acquire_prefix", SlotOpcode::kFound, claim.slots, claim.tokens, claim.sources);
    }
    std::vector<std::int32_t> counts;
    for (const std::int64_t found : claim.tokens) counts.push_back(kPrompt - static_cast<std::int32_t>(found));
    Run(claim.slots, counts);
    for (const auto& shard : shards_) {
      Timed(times, "commit", [&] {
        for (std::size_t i = 0; i < requests.size(); ++i) {
          Check(
              shard->pool().Commit(claim.slots[i], {requests[i].ids.begin() + claim.tokens[i], requests[i].ids.end()}));
        }
      });
    }
    for (const std::int32_t slot : claim.slots) running_.push_back({slot, kPrompt});
  }

  const std::int32_t slots_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::vector<Running> running_;
  std::int32_t last_ = 0;
};

int Main(int argc, char** argv) {
  int devices = 1, slots = 4096, steps = 64;
  for (int i = 1; i + 1 < argc; i += 2) {
    int* const option = std::strcmp(argv[i], "--devices") == 0 ? &devices
                        : std::strcmp(argv[i], "--slots") == 0 ? &slots
                        : std::strcmp(argv[i], "--steps") == 0 ? &steps
                                                               : nullptr;
    if (option != nullptr) *option = static_cast<int>(std::strtol(argv[i + 1], nullptr, 10));
    if (option == nullptr || *option < 1) Check(InvalidArgument(std::string("wrong option: ") + argv[i]));
  }
  Simulation simulation(devices, slots);
  for (int i = 0; i < kAnswer; ++i) simulation.Step(nullptr);  // every request has ended once
  std::map<std::string, std::vector<double>> samples;
  const std::int64_t before = simulation.calls();
  for (int i = 0; i < steps; ++i) {
    std::map<std::string, double> times;
    simulation.Step(&times);
    double all = 0;
    for (const auto& [name, time] : times) all += time;
    times["all"] = all;
    for (const auto& [name, time] : times) samples[name].push_back(time);
  }
  std::printf(R"({"devices": %d, "slots": %d, "blocks mapped or unmapped a step and device": %.1f)", devices, slots,
              static_cast<double>(simulation.calls() - before) / steps);
  for (auto& [name, all] : samples) {
    std::sort(all.begin(), all.end());
    std::printf(R"(, "%s": %.1f)", name.c_str(), all[all.size() / 2]);
  }
  std::printf("}\n");
  return 0;
}

}  // namespace
}  // namespace kvpage

int main(int argc, char** argv) { return kvpage::Main(argc, argv); }
