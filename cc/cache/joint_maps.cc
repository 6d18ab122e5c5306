#include "cache/joint_maps.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>

#include "cache/joint_supply.h"
#include "cache/map_ops.h"
#include "cache/messages.h"

namespace kvpage {
namespace {

// How long a decision waits for a host call.
constexpr std::chrono::milliseconds kPatience{100};

std::string Listed(const std::vector<std::int32_t>& values) {
  constexpr std::size_t kMost = 8;
  std::string text;
  for (std::size_t i = 0; i < std::min(values.size(), kMost); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  }
  return "[" + text + (values.size() > kMost ? ", ...]" : "]");
}

}  // namespace

class JointMaps::Alive {
 public:
  explicit Alive(const std::vector<Member>& members) {
    for (const Member& member : members) lives_.push_back(member.life.lock());
  }
  bool all() const {
    return std::all_of(lives_.begin(), lives_.end(), [](const auto& life) { return life != nullptr; });
  }

 private:
  std::vector<std::shared_ptr<void>> lives_;
};

void JointMaps::Begin(std::vector<Start> starts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  starts_ = std::move(starts);
  std::fill(calls_.begin(), calls_.end(), 0u);
  decisions_.clear();
}

void JointMaps::Together(const std::shared_ptr<JointStep>& step) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(steps_.begin(), steps_.end(), step) == steps_.end()) steps_.push_back(step);
  }
  RunSteps();
}

void JointMaps::RunSteps() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (hosts_ > 0 || steps_.empty()) return;
  }
  const Alive alive(members_);
  std::vector<std::shared_ptr<JointStep>> ran;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (hosts_ > 0) return;
    ran.swap(steps_);
    if (alive.all()) {
      const std::vector<const PoolParts*> parts = Parts();
      const JointSupply supply(parts);
      for (const std::shared_ptr<JointStep>& step : ran) {
        if (!step->Run(parts, supply)) steps_.push_back(step);
      }
    }
  }
  for (const std::shared_ptr<JointStep>& step : ran) alive.all() ? step->After() : step->Abandon();
}

void JointMaps::EnterHost() {
  RunSteps();
  const Alive alive(members_);
  std::unique_lock<std::mutex> lock(mutex_);
  decided_.wait(lock, [this] { return waiting_ == 0 || hosts_ > 0; });
  ++hosts_;
  patience_ = std::chrono::steady_clock::now() + kPatience;
  if (!unaligned_ || !alive.all()) return;
  const std::vector<const PoolParts*> parts = Parts();
  JointSupply(parts).Align();
  unaligned_ = false;
}

void JointMaps::LeaveHost() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    hosts_ = std::max(hosts_ - 1, 0);
  }
  host_left_.notify_all();
  RunSteps();
}

JointMaps::Numbers JointMaps::numbers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Numbers numbers = numbers_;
  numbers.pending = static_cast<std::int64_t>(decisions_.size());
  return numbers;
}

std::vector<const PoolParts*> JointMaps::Parts() const {
  std::vector<const PoolParts*> parts;
  for (const Member& member : members_) parts.push_back(member.parts);
  return parts;
}

std::list<JointMaps::Decision>::iterator JointMaps::Find(std::size_t device, const Decision& call) {
  const bool repeats = members_[device].parts->options.allow_stale && !mirrored_;
  return std::find_if(decisions_.begin(), decisions_.end(), [&](const Decision& made) {
    if (made.fetched[device]) return false;
    return repeats ? made.slots == call.slots && made.tokens == call.tokens : made.at == call.at;
  });
}

bool JointMaps::Enough(const Decision& call) const {
  for (const Member& member : members_) {
    const SlotTable& table = *member.parts->table;
    const StateLock state = table.Lock();
    for (std::size_t i = 0; i < call.slots.size(); ++i) {
      if (call.slots[i] == -1 || !call.ok[i]) continue;
      if (call.tokens[i] > table.host(state, call.slots[i]).reserved) return false;
    }
  }
  return true;
}

Status JointMaps::MapAlike(const char* op, JointSupply* supply, Decision* call) {
  const std::vector<const PoolParts*> parts = Parts();
  const Geometry& geometry = parts[0]->table->geometry();
  for (std::size_t i = 0; i < call->slots.size(); ++i) {
    const std::int32_t slot = call->slots[i];
    if (slot == -1 || !call->ok[i]) continue;
    std::int64_t total = call->tokens[i];
    for (const PoolParts* pool : parts) total = std::max(total, pool->table->host(pool->table->Lock(), slot).reserved);
    const Status status = supply->Reserve({slot, geometry.BlocksFor(total)});
    if (status.code() == Code::kResourceExhausted) {
      call->ok[i] = 0;
      continue;
    }
    if (!status.ok()) {
      return status.WithMessage(std::string(op) + ": slot " + std::to_string(slot) + ": " + status.message());
    }
    for (const PoolParts* pool : parts) pool->table->Reserve(pool->table->Lock(), slot, call->tokens[i]);
  }
  return {};
}

Status JointMaps::Check(const StateLock& state, const Call& call, bool* ok) const {
  const PoolParts& own = *members_[call.device].parts;
  if (call.cache == nullptr) {
    KVPAGE_RETURN_IF_ERROR(
        map_ops::CheckOnHost(own, state, call.op, call.generation, call.slots, call.tokens, call.count, ok));
  } else {
    bool enough = true;
    KVPAGE_RETURN_IF_ERROR(
        map_ops::Check(own, state, call.op, *call.cache, call.slots, call.tokens, call.count, ok, &enough));
  }
  const std::int32_t current = starts_[call.device].generation;
  if (call.generation == current) return {};
  return messages::OtherGeneration(call.op, own.table->id(), call.generation, current);
}

void JointMaps::Advance(const StateLock& state, const Call& call, std::uint32_t* epoch) {
  if (call.cache == nullptr) {
    ++calls_[call.device];
  } else {
    *epoch = members_[call.device].parts->table->progress(state).NextEpoch();
  }
}

Status JointMaps::Decide(const Call& call, Decision* decision, std::uint32_t* epoch) {
  const std::vector<const PoolParts*> parts = Parts();
  // Generations begin and slots change owners only under a mapping mutex, or while the slots are not pinned.
  JointSupply supply(parts);
  std::deque<PinnedSlots> pinned;
  Pins pins;
  for (const std::int32_t slot : decision->slots) {
    if (slot != -1) pins.sequences.push_back({slot, 0, 0, 0});
  }
  const auto pin = [&](std::size_t i) -> Status {
    SlotTable& table = *parts[i]->table;
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, call.op));
    CollectReleases(*parts[i], state);
    const std::int32_t generation = table.progress(state).generation;
    if (generation != starts_[i].generation) {
      return messages::OtherGeneration(call.op, table.id(), starts_[i].generation, generation);
    }
    for (const std::int32_t slot : decision->slots) {
      // Checks occupancy only: the caches of the other devices lag behind this one's.
      if (slot != -1 && table.Vacant(state, slot)) return messages::SlotFree(call.op, slot);
    }
    if (i == call.device) {
      const std::unique_ptr<bool[]> ok(new bool[call.count]);
      KVPAGE_RETURN_IF_ERROR(Check(state, call, ok.get()));
      Advance(state, call, epoch);
    }
    pinned.emplace_back().Pin(state, &table, pins);
    return {};
  };
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (i != call.device) KVPAGE_RETURN_IF_ERROR(pin(i));
  }
  KVPAGE_RETURN_IF_ERROR(pin(call.device));  // last: this counts the device's epoch
  decision->status = MapAlike(call.op, &supply, decision);
  unaligned_ |= supply.failed();
  return {};
}

void JointMaps::Keep(std::size_t device, Decision decision) {
  ++numbers_.decisions;
  decision.fetched.assign(members_.size(), false);
  decision.fetched[device] = true;
  // Devices that have rejected the call are already past it.
  for (std::size_t i = 0; mirrored_ && i < members_.size(); ++i) {
    if (calls_[i] > decision.at) decision.fetched[i] = true;
  }
  decision.missing = static_cast<std::size_t>(std::count(decision.fetched.begin(), decision.fetched.end(), false));
  if (decision.missing > 0) decisions_.push_back(std::move(decision));
}

void JointMaps::Fetched(std::size_t device, std::list<Decision>::iterator made) {
  made->fetched[device] = true;
  if (--made->missing == 0) decisions_.erase(made);
}

Status JointMaps::Run(const Call& call, bool* ok, std::uint32_t* epoch) {
  SlotTable& table = *members_[call.device].parts->table;
  const Alive alive(members_);
  {
    StateLock state = table.Lock();
    table.PassGate(&state);  // a new generation waits; no lock is held meanwhile
  }
  std::unique_lock<std::mutex> lock(mutex_);
  for (bool waited = false;; waited = true) {
    Decision decision;
    decision.slots.assign(call.slots, call.slots + call.count);
    decision.tokens.assign(call.tokens, call.tokens + call.count);
    decision.at = call.cache == nullptr ? calls_[call.device] : call.cache->epoch - starts_[call.device].epoch;
    auto made = decisions_.end();
    {
      const StateLock state = table.Lock();
      KVPAGE_RETURN_IF_ERROR(Check(state, call, ok));
      made = Find(call.device, decision);
      if (made != decisions_.end()) {
        if (made->slots != decision.slots || made->tokens != decision.tokens) {
          return InvalidArgument(std::string(call.op) + ": the devices of the mesh request different blocks: slots " +
                                 Listed(decision.slots) + " with " + Listed(decision.tokens) + " tokens here, slots " +
                                 Listed(made->slots) + " with " + Listed(made->tokens) +
                                 " on another: slots and num_tokens must be the same on all devices");
        }
        Advance(state, call, epoch);
      }
    }
    if (made != decisions_.end()) {
      ++numbers_.fetched;
      const Status status = made->status;
      std::copy(made->ok.begin(), made->ok.end(), ok);
      Fetched(call.device, made);
      return status;
    }
    if (!alive.all()) return messages::Closed(call.op, table.id());
    decision.ok.assign(ok, ok + call.count);
    const bool enough = Enough(decision);
    if (!enough && hosts_ > 0 && !waited) {
      ++numbers_.waits;
      ++waiting_;
      host_left_.wait_until(lock, patience_, [this] { return hosts_ == 0; });
      if (--waiting_ == 0) decided_.notify_all();  // they will see it when this thread has decided
      continue;                                    // another device may have decided meanwhile
    }
    if (enough) {
      const StateLock state = table.Lock();
      KVPAGE_RETURN_IF_ERROR(Check(state, call, ok));
      Advance(state, call, epoch);
    } else {
      KVPAGE_RETURN_IF_ERROR(Decide(call, &decision, epoch));
    }
    std::copy(decision.ok.begin(), decision.ok.end(), ok);
    const Status status = decision.status;
    Keep(call.device, std::move(decision));
    return status;
  }
}

Status JointMaps::Map(std::size_t device, const char* op, const CacheRef& cache, const std::int32_t* slots,
                      const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch) {
  return Run({device, op, cache.generation, &cache, slots, tokens, count}, ok, epoch);
}

Status JointMaps::MapChecked(std::size_t device, const char* op, std::int32_t generation, const std::int32_t* slots,
                             const std::int32_t* tokens, std::int64_t count, bool* ok) {
  {
    SlotTable& table = *members_[device].parts->table;
    table.CountWait(table.Lock());  // the handler has waited for the device's answer
  }
  return Run({device, op, generation, nullptr, slots, tokens, count}, ok, nullptr);
}

void JointMaps::PassOver(std::size_t device, std::int32_t generation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (generation != starts_[device].generation) return;
  Decision call;
  call.at = calls_[device]++;
  if (const auto made = Find(device, call); made != decisions_.end()) Fetched(device, made);
}

}  // namespace kvpage
