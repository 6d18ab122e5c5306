// JointSwap: a sequence that was swapped out of several pools that stand for one, a pool for each device of a mesh.
// Each pool writes its own part, and all go through the same states together: what the slot has is taken when its
// release program has run on all devices; blocks come free when all parts are in the store, and stay when one of them
// could not be written; what was read is in memory when all parts are. So all pools free the same blocks in the same
// order, and hand out the same ones afterwards.
//
// These changes are made by whoever comes last, a handler or a thread of the store, and never while a call of the
// host's goes from pool to pool (JointMaps::Together).
//
// Order of locks: those of JointMaps, then the mutex here, then a state mutex.
#ifndef KVPAGE_CACHE_JOINT_SWAP_H_
#define KVPAGE_CACHE_JOINT_SWAP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cache/joint_maps.h"
#include "cache/joint_step.h"
#include "cache/swap_table.h"

namespace kvpage {

class JointSwap final : public SwapGroup, public JointStep, public std::enable_shared_from_this<JointSwap> {
 public:
  // What swapping::Out has made of one slot, in the order of the pools; before the release program is queued. It ends
  // with swapping::In or swapping::Drop in all pools, or with Drop here.
  static std::shared_ptr<JointSwap> Make(const std::shared_ptr<JointMaps>& maps, std::vector<SwapPtr> parts);

  const std::vector<SwapPtr>& parts() const { return parts_; }
  const std::weak_ptr<JointMaps>& maps() const { return maps_; }

  // ---- the host's ----
  // Claims blocks in one pool for what the store has, which is being read once that is done in all of them. Nothing
  // happens if the sequence is in memory.
  Claim StartRead(std::size_t pool);
  // Takes that back; nothing happens if reading has begun.
  void CancelRead(std::size_t pool);
  // Gives the sequence up in all pools: now, or at the end of a call of the host's that is under way.
  void Drop();

  // ---- looking ----
  bool gone() const;
  bool stored() const;
  // As those of Swap: what all parts have.
  std::int64_t tokens() const;
  std::int64_t tokens_in_memory() const;
  std::string error() const;
  // Whether nothing is to be waited for in any pool, within some seconds.
  bool Wait(double seconds);

  void Continue() override;
  bool Run(const std::vector<const PoolParts*>& pools, const JointSupply& supply) override;
  void After() override;
  void Abandon() override;

 private:
  // A read of a part, from the claim of its blocks to its end.
  struct Read {
    store::SwapRead read;  // with an image until it is submitted
    store::Problem problem = store::Problem::kNone;
    std::int64_t good = 0;
  };
  using Images = std::vector<std::shared_ptr<store::SwapImage>>;

  JointSwap(const std::shared_ptr<JointMaps>& maps, std::vector<SwapPtr> parts)
      : maps_(maps), parts_(std::move(parts)), reads_(parts_.size()) {}

  void Capture(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  void EndWrites(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  void EndReads(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  // A thread of the store has ended with a part.
  void WriteEnded(std::size_t pool, std::shared_ptr<store::SwapImage> image);
  void ReadEnded(std::size_t pool, store::Problem problem, std::int64_t good);
  void SubmitWrite(std::size_t pool, store::SwapWrite write);
  void SubmitRead(std::size_t pool, store::SwapRead read);

  const std::weak_ptr<JointMaps> maps_;
  const std::vector<SwapPtr> parts_;
  mutable std::mutex mutex_;
  bool dropped_ = false;
  std::vector<store::SwapWrite> writes_;  // to be submitted
  std::vector<Read> reads_;
  bool submit_reads_ = false;
  std::size_t writing_ = 0, reading_ = 0;  // parts that the store has not ended with
  bool written_ = false, read_ = false;    // it has ended with all of them
  Images images_;                          // of the parts that were written
  Images unwanted_;                        // end without a lock
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_SWAP_H_
