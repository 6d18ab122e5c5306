// JointMaps: makes one decision for all joined pools (one for each device of a mesh) about how programs map memory.
// Programs run on the devices at different times, so the first device to reach a call of map_slots decides and maps
// memory in all arenas (joint_supply.h); the others fetch its decision. No device waits for another.
//
// A decision is identified by the number of epochs between the start of the generation and its call, which is the same
// on all devices because every op that changes a cache counts; if steps may be repeated from one cache (allow_stale),
// by its arguments. With mirrors it is identified by the number of map_slots calls that the device has made in the
// generation: each device runs its programs in the same order, and continues after an op that it rejected without
// counting an epoch. A decision is kept until every device has fetched it or the generation ends.
//
// Lock order: the mutex here, then the mapping mutexes of the pools in order, then a state mutex.
#ifndef KVPAGE_CACHE_JOINT_MAPS_H_
#define KVPAGE_CACHE_JOINT_MAPS_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "cache/joint_step.h"
#include "cache/parts.h"

namespace kvpage {

class JointMaps {
 public:
  // A pool, and its parts while it exists.
  struct Member {
    std::weak_ptr<void> life;
    const PoolParts* parts = nullptr;
  };
  // Where the current generation of a pool began.
  struct Start {
    std::int32_t generation = 0;
    std::uint32_t epoch = 0;
  };
  struct Numbers {
    std::int64_t decisions = 0;  // made
    std::int64_t fetched = 0;    // taken over from another device
    std::int64_t pending = 0;    // kept now
    std::int64_t waits = 0;      // decisions that waited for a host call
  };

  // Either all pools have a mirror or none has.
  explicit JointMaps(std::vector<Member> members)
      : members_(std::move(members)),
        mirrored_(members_[0].parts->mirror != nullptr),
        starts_(members_.size()),
        calls_(members_.size(), 0) {}

  // Called when a generation has begun in all pools. Programs of older ones can no longer make decisions.
  void Begin(std::vector<Start> starts);
  // map_slots on one of the devices, as map_ops::MapSlots.
  Status Map(std::size_t device, const char* op, const CacheRef& cache, const std::int32_t* slots,
             const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch);
  // With mirrors: the host's part of map_slots on one of the devices, like map_ops::MapChecked.
  Status MapChecked(std::size_t device, const char* op, std::int32_t generation, const std::int32_t* slots,
                    const std::int32_t* tokens, std::int64_t count, bool* ok);
  // With mirrors: the device has rejected a call of map_slots and continues after it.
  void PassOver(std::size_t device, std::int32_t generation);
  // Called before and after a host call that goes from pool to pool. New decisions wait for its end, so that it finds
  // all pools in the same state, but only for a limited time, because the caller may be waiting for Python. A decision
  // made during a host call takes only what all pools can give. The next host call lets waiting decisions go first.
  void EnterHost();
  void LeaveHost();
  // Makes a change in all pools at once: now, or at the end of a host call in progress. A change that cannot be made
  // yet is retried before and after later host calls. Does nothing once a pool has been destroyed. Call this without
  // locks.
  void Together(const std::shared_ptr<JointStep>& step);
  const std::vector<Member>& members() const { return members_; }
  Numbers numbers() const;

 private:
  // A call of map_slots on one of the devices.
  struct Call {
    std::size_t device = 0;
    const char* op = nullptr;
    std::int32_t generation = 0;
    const CacheRef* cache = nullptr;  // null: the device has already checked it
    const std::int32_t* slots = nullptr;
    const std::int32_t* tokens = nullptr;
    std::int64_t count = 0;
  };
  struct Decision {
    std::uint32_t at = 0;  // epochs (with mirrors: calls) since the generation began
    std::vector<std::int32_t> slots, tokens;
    std::vector<char> ok;
    Status status;  // if not ok, the calls fail in the same way
    std::vector<bool> fetched;
    std::size_t missing = 0;  // number of devices that have not fetched it
  };
  // Keeps all pools alive.
  class Alive;

  // The oldest decision about this call that the device has not fetched, or the end.
  std::list<Decision>::iterator Find(std::size_t device, const Decision& call);
  // Common part of Map and MapChecked. `epoch` is null if there is no cache.
  Status Run(const Call& call, bool* ok, std::uint32_t* epoch);
  // Checks a call against the device's table, and sets those ok[i] that can be decided already.
  Status Check(const StateLock& state, const Call& call, bool* ok) const;
  // Advances the device past the call, which was checked under the same lock.
  void Advance(const StateLock& state, const Call& call, std::uint32_t* epoch);
  // Decides about a call. `alive` must hold all pools, and no host call may be in the way.
  Status Decide(const Call& call, Decision* decision, std::uint32_t* epoch);
  Status MapAlike(const char* op, class JointSupply* supply, Decision* call);
  // Keeps a decision until all devices that have not reached the call yet have fetched it.
  void Keep(std::size_t device, Decision decision);
  void Fetched(std::size_t device, std::list<Decision>::iterator made);
  // Runs pending steps, unless a host call is in progress.
  void RunSteps();
  // Whether all pools have room for what the call wants.
  bool Enough(const Decision& call) const;
  std::vector<const PoolParts*> Parts() const;

  const std::vector<Member> members_;
  const bool mirrored_;
  mutable std::mutex mutex_;
  std::condition_variable host_left_, decided_;
  std::vector<Start> starts_;
  std::vector<std::uint32_t> calls_;  // map_slots calls in this generation, with mirrors
  std::list<Decision> decisions_;
  Numbers numbers_;
  std::vector<std::shared_ptr<JointStep>> steps_;  // pending
  int hosts_ = 0;                                  // host calls in progress
  int waiting_ = 0;                                // decisions waiting for host calls to end
  std::chrono::steady_clock::time_point patience_;
  bool unaligned_ = false;  // a decision has failed: the pools may hand out free blocks in different orders
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_MAPS_H_
