#include "cache/pool.h"

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
  if (mirror_ != nullptr && !mirror_->Leave()) supply_.arena(supply_.Lock()).Abandon();
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
