#include "cache/pool.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "cache/messages.h"
#include "cache/process.h"

namespace kvpage {

Pool::Pool(const Geometry& geometry, const PoolOptions& options, std::unique_ptr<Arena> arena, MapAccount* account,
           std::unique_ptr<Mirror> mirror)
    : fork_count_(ForkCount()),
      table_(geometry),
      supply_(&table_, std::move(arena), account, options.poison),
      mirror_(std::move(mirror)),
      parts_{options, &table_, &supply_, mirror_.get()} {
  if (mirror_ != nullptr) supply_.arena(supply_.Lock()).FollowRuns(mirror_.get());
}

Status Pool::Make(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options,
                  std::unique_ptr<Vmm> vmm, MapAccount* account, std::shared_ptr<Pool>* out,
                  std::unique_ptr<Mirror> mirror) {
  const std::int64_t blocks = capacity_bytes / geometry.block_bytes;
  if (blocks < geometry.num_ranges()) {
    return InvalidArgument("capacity is " + std::to_string(capacity_bytes) + " bytes, " + std::to_string(blocks) +
                           " blocks; the first token of a request takes " + std::to_string(geometry.num_ranges()) +
                           " blocks of " + std::to_string(geometry.block_bytes) +
                           " bytes: give more capacity or a smaller block_tokens (a token takes " +
                           std::to_string(geometry.token_bytes()) + " bytes: num_layers, num_kv_heads and head_dim)");
  }
  std::unique_ptr<Arena> arena;
  KVPAGE_RETURN_IF_ERROR(Arena::Make(geometry, blocks, std::move(vmm), &arena));
  std::shared_ptr<Pool> pool(new Pool(geometry, options, std::move(arena), account, std::move(mirror)));
  KVPAGE_RETURN_IF_ERROR(pool->supply_.PromiseMappings(pool->supply_.Lock(), blocks));
  *out = std::move(pool);
  return {};
}

Pool::~Pool() {
  tier_.reset();
  if (mirror_ != nullptr && !mirror_->Leave()) supply_.arena(supply_.Lock()).Abandon();
}

Claim Pool::AcquirePrefix(const std::vector<prefix::Request>& requests, const prefix::Options& options) {
  Claim claim = prefix::Acquire(parts_, requests, options);
  for (std::size_t i = 0; i < claim.slots.size() && claim.status.ok(); ++i) {
    std::int64_t stored = 0;
    if (tier_ != nullptr && claim.slots[i] >= 0) {
      const std::vector<std::int32_t>& ids = requests[i].ids;
      const auto length = static_cast<std::int64_t>(ids.size());
      stored = std::min(tier_->Stored(options.space, ids.data(), length), length - (options.whole ? 0 : 1));
    }
    claim.stored.push_back(std::max<std::int64_t>(stored - claim.tokens[i], 0));
  }
  return claim;
}

Status Pool::AttachStore(std::shared_ptr<store::PrefixStore> store, double write_ahead) {
  KVPAGE_RETURN_IF_ERROR(store->Check("KVPool"));
  std::shared_ptr<BlockMover> mover;
  KVPAGE_RETURN_IF_ERROR(supply_.arena(supply_.Lock()).Mover(&mover));
  if (store->copies() != (mover != nullptr)) {
    return {Code::kUnimplemented,
            std::string("KVPool: store: wanted a store ") +
                (mover != nullptr ? "in host memory for a pool on a device" : "on disk for a pool on CPU")};
  }
  tier_ = std::make_unique<prefix::Tier>(parts_, std::move(store), write_ahead, std::move(mover));
  return {};
}

Status Pool::StoredPrefix(const std::string& space, const prefix::TokenIds& ids, std::int64_t* tokens) {
  KVPAGE_RETURN_IF_ERROR(Enter(parts_, table_.Lock(), "stored_prefix"));
  *tokens = tier_ == nullptr ? 0 : tier_->Stored(space, ids.data(), static_cast<std::int64_t>(ids.size()));
  return {};
}

Status Pool::Prefetch(const prefix::FetchRequest& request, std::shared_ptr<prefix::FetchTicket>* out) {
  if (tier_ != nullptr) return tier_->Prefetch(request, out);
  KVPAGE_RETURN_IF_ERROR(Enter(parts_, table_.Lock(), "prefetch"));
  *out = std::make_shared<prefix::FetchTicket>();
  (*out)->Finish(0, "");
  return {};
}

Status Pool::Join(const std::vector<std::shared_ptr<Pool>>& pools, std::shared_ptr<JointMaps>* out) {
  std::vector<JointMaps::Member> members;
  std::set<int> devices;
  for (const std::shared_ptr<Pool>& pool : pools) {
    const bool twice = pool->mirrored() && !devices.insert(pool->device()).second;
    if (twice || pool->mirrored() != pools[0]->mirrored() || pool->joint_ != nullptr ||
        pool->geometry().spec() != pools[0]->geometry().spec()) {
      return InvalidArgument(
          "pools that map memory together: wanted pools of one spec, each once, all of them on CPU devices or each on "
          "another GPU");
    }
    members.push_back({pool, &pool->parts_});
  }
  *out = std::make_shared<JointMaps>(std::move(members));
  for (std::size_t i = 0; i < pools.size(); ++i) {
    pools[i]->joint_ = *out;
    pools[i]->joint_index_ = i;
  }
  return {};
}

void Pool::ShareFaults(std::shared_ptr<SharedFaults> faults, std::string note) {
  const std::size_t number = faults->Join(std::move(note));
  const StateLock state = table_.Lock();
  table_.progress(state).device = number;
  table_.progress(state).faults = std::move(faults);
}

bool Pool::KeepFault(std::int32_t generation, const Status& fault) {
  const StateLock state = table_.Lock();
  return !table_.closed(state) && table_.progress(state).Keep(generation, fault);
}

Status Pool::TakeFault() {
  const StateLock state = table_.Lock();
  const std::shared_ptr<SharedFaults>& faults = table_.progress(state).faults;
  if (faults == nullptr) return Enter(parts_, state, "check");
  KVPAGE_RETURN_IF_ERROR(table_.CheckOpen(state, "check"));
  return faults->Take();
}

Status Pool::UntoldFault() {
  const StateLock state = table_.Lock();
  const std::shared_ptr<SharedFaults>& faults = table_.progress(state).faults;
  return faults == nullptr ? Status() : faults->Untold();
}

Status Pool::Close(const GoOn& go_on) {
  if (tier_ != nullptr) KVPAGE_RETURN_IF_ERROR(tier_->Close(go_on));
  return generations::Close(parts_, go_on);
}

Status Pool::CheckProcess(const char* op) const {
  return ForkCount() == fork_count_ ? Status() : OtherProcess(op, id());
}

Status Pool::OtherProcess(const char* op, std::int32_t id) {
  return FailedPrecondition(
      std::string(op) + ": pool " + std::to_string(id) +
          " was made before this process was forked and works in its own process only: make a new "
          "pool here (with the `spawn` or `forkserver` start method, as JAX itself needs)",
      Reason::kForked);
}

Status Pool::CheckProgram(const char* op, const SpecInts& spec) const {
  KVPAGE_RETURN_IF_ERROR(CheckProcess(op));
  if (spec == geometry().spec()) return {};
  return messages::OtherSpec(op, id(), spec, geometry().spec());
}

Status Pool::OpenMirror() {
  const MappingLock mapping = supply_.Lock();
  return mirror_->Open(id());
}

}  // namespace kvpage
