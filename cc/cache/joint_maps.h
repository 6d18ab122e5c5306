// JointMaps: one decision for all of how programs map memory in pools that stand for one, a pool for each device of a
// mesh. Programs run on the devices at different times, so the first device that comes to a call of map_slots decides
// and maps in all arenas (joint_supply.h); the others fetch what it decided. Nobody waits for another device.
//
// A decision is known by how many epochs into the generation its call is, which is the same on all devices because
// every op that changes a cache counts; where steps may be repeated from one cache (allow_stale), by what it asks for.
// With mirrors it is known by how many calls of map_slots the device has made in the generation: each runs its programs
// in one order, and goes on after an op that it refused, without counting an epoch. It is kept until every device has
// fetched it or the generation ends.
//
// Order of locks: the mutex here, then the mapping mutexes of the pools in their order, then a state mutex.
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
  // A pool, and its parts while it lives.
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
    std::int64_t waits = 0;      // decisions that waited for a call of the host's
  };

  // All pools have a mirror, or none has.
  explicit JointMaps(std::vector<Member> members)
      : members_(std::move(members)),
        mirrored_(members_[0].parts->mirror != nullptr),
        starts_(members_.size()),
        calls_(members_.size(), 0) {}

  // A generation has begun in all pools. Programs of older ones decide nothing more.
  void Begin(std::vector<Start> starts);
  // map_slots on one of the devices, as map_ops::MapSlots.
  Status Map(std::size_t device, const char* op, const CacheRef& cache, const std::int32_t* slots,
             const std::int32_t* tokens, std::int64_t count, bool* ok, std::uint32_t* epoch);
  // With mirrors: the host's part of map_slots on one of the devices, as map_ops::MapChecked.
  Status MapChecked(std::size_t device, const char* op, std::int32_t generation, const std::int32_t* slots,
                    const std::int32_t* tokens, std::int64_t count, bool* ok);
  // With mirrors: the device has refused a call of map_slots, and goes on behind it.
  void PassOver(std::size_t device, std::int32_t generation);
  // A call of the host's goes from pool to pool between these two. New decisions wait for its end, so that it finds all
  // pools in the same state, but not for long: whoever calls may wait for Python meanwhile. A decision that comes
  // between takes only what all pools can give. The next call of the host's lets those decide first that wait.
  void EnterHost();
  void LeaveHost();
  // Makes a change in all pools at once: now, or, while a call of the host's is under way, at its end. One that cannot
  // be made yet is tried again before and after further calls. Nothing happens once a pool has ended. Call this without
  // locks.
  void Together(const std::shared_ptr<JointStep>& step);
  const std::vector<Member>& members() const { return members_; }
  Numbers numbers() const;

 private:
  // map_slots on one of the devices.
  struct Call {
    std::size_t device = 0;
    const char* op = nullptr;
    std::int32_t generation = 0;
    const CacheRef* cache = nullptr;  // null: the device has checked it
    const std::int32_t* slots = nullptr;
    const std::int32_t* tokens = nullptr;
    std::int64_t count = 0;
  };
  struct Decision {
    std::uint32_t at = 0;  // epochs, or with mirrors calls, since the generation began
    std::vector<std::int32_t> slots, tokens;
    std::vector<char> ok;
    Status status;  // not ok: the calls fail alike
    std::vector<bool> fetched;
    std::size_t missing = 0;  // devices that have not fetched it
  };
  // Keeps all pools alive.
  class Alive;

  // The oldest decision about this call that the device has not fetched, or the end.
  std::list<Decision>::iterator Find(std::size_t device, const Decision& call);
  // Both kinds of call. `epoch`: null where there is no cache.
  Status Run(const Call& call, bool* ok, std::uint32_t* epoch);
  // Compares a call with the device's table, and sets ok[i] as far as that is known.
  Status Check(const StateLock& state, const Call& call, bool* ok) const;
  // The device goes on behind the call, which was checked under the same lock.
  void Advance(const StateLock& state, const Call& call, std::uint32_t* epoch);
  // Decides about a call, once `alive` has all pools and no call of the host's is in the way.
  Status Decide(const Call& call, Decision* decision, std::uint32_t* epoch);
  Status MapAlike(const char* op, class JointSupply* supply, Decision* call);
  // Keeps a decision until the devices that have not passed it yet have fetched it.
  void Keep(std::size_t device, Decision decision);
  void Fetched(std::size_t device, std::list<Decision>::iterator made);
  // Runs the steps that have not been made, unless a call of the host's is under way.
  void RunSteps();
  // Whether all pools have room for what the call wants.
  bool Enough(const Decision& call) const;
  std::vector<const PoolParts*> Parts() const;

  const std::vector<Member> members_;
  const bool mirrored_;
  mutable std::mutex mutex_;
  std::condition_variable host_left_, decided_;
  std::vector<Start> starts_;
  std::vector<std::uint32_t> calls_;  // of map_slots in the generation, where there are mirrors
  std::list<Decision> decisions_;
  Numbers numbers_;
  std::vector<std::shared_ptr<JointStep>> steps_;  // that have not been made
  int hosts_ = 0;                                  // calls of the host's
  int waiting_ = 0;                                // decisions that wait for their end
  std::chrono::steady_clock::time_point patience_;
  bool unaligned_ = false;  // a decision has failed: the pools may hand out free blocks in different orders
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_MAPS_H_
