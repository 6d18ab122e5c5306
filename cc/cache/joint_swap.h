// JointSwap: a sequence that was swapped out of several joined pools, one for each device of a mesh. Each pool writes
// its own part, but all parts change state together: the slot's contents are taken once its release program has run on
// all devices; blocks are freed once all parts are stored, and kept if any part could not be written; the sequence is
// in memory again once all parts are. So all pools free the same blocks in the same order and later hand out the same
// ones.
//
// Whichever handler or store thread finishes last makes these changes, and never while a host call is going from pool
// to pool (JointMaps::Together).
//
// Lock order: those of JointMaps, then the mutex here, then a state mutex.
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
  // Joins the results of swapping::Out for one slot, in the order of the pools, before the release program is queued.
  // The swap ends with swapping::In or swapping::Drop in all pools, or with Drop here.
  static std::shared_ptr<JointSwap> Make(const std::shared_ptr<JointMaps>& maps, std::vector<SwapPtr> parts);

  const std::vector<SwapPtr>& parts() const { return parts_; }
  const std::weak_ptr<JointMaps>& maps() const { return maps_; }

  // ---- called by the host ----
  // Claims blocks in one pool for the stored part. Reading starts once this was done in all pools. Does nothing if the
  // sequence is in memory.
  Claim StartRead(std::size_t pool);
  // Undoes StartRead; does nothing once reading has begun.
  void CancelRead(std::size_t pool);
  // Drops the sequence in all pools: now, or at the end of a host call in progress.
  void Drop();

  // ---- queries ----
  bool gone() const;
  bool stored() const;
  // The minimum over all parts of the same function of Swap.
  std::int64_t tokens() const;
  std::int64_t tokens_in_memory() const;
  std::string error() const;
  // Waits up to `seconds` for pending work in all pools. Returns whether all of it is done.
  bool Wait(double seconds);

  void Continue() override;
  bool Run(const std::vector<const PoolParts*>& pools, const JointSupply& supply) override;
  void After() override;
  void Abandon() override;

 private:
  // A read of one part, from the claim of its blocks to completion.
  struct Read {
    store::SwapRead read;  // has an image until submitted
    store::Problem problem = store::Problem::kNone;
    std::int64_t good = 0;
  };
  using Images = std::vector<std::shared_ptr<store::SwapImage>>;

  JointSwap(const std::shared_ptr<JointMaps>& maps, std::vector<SwapPtr> parts)
      : maps_(maps), parts_(std::move(parts)), reads_(parts_.size()) {}

  void Capture(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  void EndWrites(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  void EndReads(const std::vector<const PoolParts*>& pools, const JointSupply& supply);
  // A store thread has finished writing one part.
  void WriteEnded(std::size_t pool, std::shared_ptr<store::SwapImage> image);
  void ReadEnded(std::size_t pool, store::Problem problem, std::int64_t good);
  void SubmitWrite(std::size_t pool, store::SwapWrite write);
  void SubmitRead(std::size_t pool, store::SwapRead read);

  const std::weak_ptr<JointMaps> maps_;
  const std::vector<SwapPtr> parts_;
  mutable std::mutex mutex_;
  bool dropped_ = false;
  std::vector<store::SwapWrite> writes_;  // not submitted yet
  std::vector<Read> reads_;
  bool submit_reads_ = false;
  std::size_t writing_ = 0, reading_ = 0;  // parts still being written or read by the store
  bool written_ = false, read_ = false;    // all parts finished, not yet applied in Run
  Images images_;                          // of the parts written successfully
  Images unwanted_;                        // to be destroyed without holding a lock
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_SWAP_H_
