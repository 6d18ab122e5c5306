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

// How long a decision waits for a call of the host's.
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
  decisions_.clear();
}

void JointMaps::EnterHost() {
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
  const bool repeats = members_[device].parts->options.allow_stale;
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

Status JointMaps::Advance(const StateLock& state, const PoolParts& pool, const char* op, const CacheRef& cache,
                          const Decision& call, std::uint32_t* epoch) {
  const auto count = static_cast<std::int64_t>(call.slots.size());
  const std::unique_ptr<bool[]> ok(new bool[count]);
  bool enough = true;
  KVPAGE_RETURN_IF_ERROR(
      map_ops::Check(pool, state, op, cache, call.slots.data(), call.tokens.data(), count, ok.get(), &enough));
  *epoch = pool.table->progress(state).NextEpoch();
  return {};
}

Status JointMaps::Decide(std::size_t device, const char* op, const CacheRef& cache, Decision* call,
                         std::uint32_t* epoch) {
  const std::vector<const PoolParts*> parts = Parts();
  // Generations begin and slots get other owners under a mapping mutex, or not while they are pinned.
  JointSupply supply(parts);
  std::deque<PinnedSlots> pinned;
  Pins pins;
  for (const std::int32_t slot : call->slots) {
    if (slot != -1) pins.sequences.push_back({slot, 0, 0, 0});
  }
  const auto pin = [&](std::size_t i) -> Status {
    SlotTable& table = *parts[i]->table;
    const StateLock state = table.Lock();
    KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state, op));
    const std::int32_t generation = table.progress(state).generation;
    if (generation != starts_[i].generation) {
      return messages::OtherGeneration(op, table.id(), starts_[i].generation, generation);
    }
    for (const std::int32_t slot : call->slots) {
      // The other devices' caches do not matter: they lag behind this one.
      if (slot != -1 && table.Vacant(state, slot)) return messages::SlotFree(op, slot);
    }
    if (i == device) KVPAGE_RETURN_IF_ERROR(Advance(state, *parts[i], op, cache, *call, epoch));
    pinned.emplace_back().Pin(state, &table, pins);
    return {};
  };
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (i != device) KVPAGE_RETURN_IF_ERROR(pin(i));
  }
  KVPAGE_RETURN_IF_ERROR(pin(device));  // last: it counts the device's epoch
  call->status = MapAlike(op, &supply, call);
  unaligned_ |= supply.failed();
  return {};
}

Status JointMaps::Map(std::size_t device, const char* op, const CacheRef& cache, const std::int32_t* slots,
                      const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch) {
  const PoolParts& own = *members_[device].parts;
  SlotTable& table = *own.table;
  const Alive alive(members_);
  {
    StateLock state = table.Lock();
    table.PassGate(&state);  // a new generation waits; no lock is held meanwhile
  }
  std::unique_lock<std::mutex> lock(mutex_);
  for (bool waited = false;; waited = true) {
    Decision call;
    call.slots.assign(slots, slots + count);
    call.tokens.assign(tokens, tokens + count);
    call.at = cache.epoch - starts_[device].epoch;
    auto made = decisions_.end();
    {
      const StateLock state = table.Lock();
      bool enough = true;
      KVPAGE_RETURN_IF_ERROR(map_ops::Check(own, state, op, cache, slots, tokens, count, ok, &enough));
      if (cache.generation != starts_[device].generation) {
        return messages::OtherGeneration(op, table.id(), cache.generation, starts_[device].generation);
      }
      made = Find(device, call);
      if (made != decisions_.end()) {
        if (made->slots != call.slots || made->tokens != call.tokens) {
          return InvalidArgument(std::string(op) + ": the devices of the mesh ask for different things: slots " +
                                 Listed(call.slots) + " with " + Listed(call.tokens) + " tokens here, slots " +
                                 Listed(made->slots) + " with " + Listed(made->tokens) +
                                 " on another: slots and num_tokens must be the same on all devices");
        }
        *epoch = table.progress(state).NextEpoch();
      }
    }
    if (made != decisions_.end()) {
      ++numbers_.fetched;
      const Status status = made->status;
      std::copy(made->ok.begin(), made->ok.end(), ok);
      made->fetched[device] = true;
      if (--made->missing == 0) decisions_.erase(made);
      return status;
    }
    if (!alive.all()) return messages::Closed(op, table.id());
    call.ok.assign(ok, ok + count);
    const bool enough = Enough(call);
    if (!enough && hosts_ > 0 && !waited) {
      ++numbers_.waits;
      ++waiting_;
      host_left_.wait_until(lock, patience_, [this] { return hosts_ == 0; });
      if (--waiting_ == 0) decided_.notify_all();  // they see it when this thread has decided
      continue;                                    // another device may have decided meanwhile
    }
    if (enough) {
      KVPAGE_RETURN_IF_ERROR(Advance(table.Lock(), own, op, cache, call, epoch));
    } else {
      KVPAGE_RETURN_IF_ERROR(Decide(device, op, cache, &call, epoch));
    }
    ++numbers_.decisions;
    std::copy(call.ok.begin(), call.ok.end(), ok);
    call.fetched.assign(members_.size(), false);
    call.fetched[device] = true;
    call.missing = members_.size() - 1;
    Status status = call.status;
    if (call.missing > 0) decisions_.push_back(std::move(call));
    return status;
  }
}

}  // namespace kvpage
