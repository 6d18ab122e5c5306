#include "cache/joint_swap.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "cache/messages.h"
#include "cache/swap_copies.h"
#include "cache/swap_steps.h"

namespace kvpage {

namespace steps = swapping::steps;

std::shared_ptr<JointSwap> JointSwap::Make(const std::shared_ptr<JointMaps>& maps, std::vector<SwapPtr> parts) {
  std::shared_ptr<JointSwap> joint(new JointSwap(maps, std::move(parts)));
  for (std::size_t i = 0; i < joint->parts_.size(); ++i) {
    const std::shared_ptr<void> life = maps->members()[i].life.lock();
    if (life == nullptr) continue;
    const MappingLock mapping = maps->members()[i].parts->supply->Lock();
    joint->parts_[i]->in_group = true;
    joint->parts_[i]->group = joint;
  }
  return joint;
}

// ---- called by the host ----

Claim JointSwap::StartRead(std::size_t pool) {
  const std::shared_ptr<JointMaps> maps = maps_.lock();
  const std::shared_ptr<const void> owner = parts_[pool]->pool.lock();
  if (maps == nullptr || owner == nullptr) {
    return FailedClaim(FailedPrecondition("prefetch: the pool is closed", Reason::kClosed));
  }
  const PoolParts& parts = *maps->members()[pool].parts;
  {
    const MappingLock mapping = parts.supply->Lock();
    const std::lock_guard<std::mutex> lock(mutex_);
    Claim claim = steps::StartRead(parts, mapping, parts_[pool], &reads_[pool].read);
    if (!claim.status.ok() || reads_[pool].read.image == nullptr) return claim;
  }
  maps->Together(shared_from_this());
  return {};
}

void JointSwap::CancelRead(std::size_t pool) {
  const std::shared_ptr<JointMaps> maps = maps_.lock();
  const std::shared_ptr<const void> owner = parts_[pool]->pool.lock();
  if (maps == nullptr || owner == nullptr) return;
  const PoolParts& parts = *maps->members()[pool].parts;
  {
    const MappingLock mapping = parts.supply->Lock();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (reads_[pool].read.image == nullptr || submit_reads_) return;
    reads_[pool] = {};
    steps::CancelRead(parts, mapping, parts_[pool]);
    if (!dropped_) return;
  }
  Continue();  // dropped meanwhile
}

void JointSwap::Drop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped_ = true;
  }
  Continue();
}

void JointSwap::Continue() {
  if (const std::shared_ptr<JointMaps> maps = maps_.lock(); maps != nullptr) return maps->Together(shared_from_this());
  Abandon();
}

// ---- queries ----

bool JointSwap::gone() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (dropped_) return true;
  }
  return std::all_of(parts_.begin(), parts_.end(),
                     [](const SwapPtr& part) { return part->state() == SwapState::kGone; });
}

bool JointSwap::stored() const {
  return std::all_of(parts_.begin(), parts_.end(),
                     [](const SwapPtr& part) { return part->state() == SwapState::kStored; });
}

std::int64_t JointSwap::tokens() const {
  std::int64_t tokens = parts_[0]->tokens();
  for (const SwapPtr& part : parts_) tokens = std::min(tokens, part->tokens());
  return tokens;
}

std::int64_t JointSwap::tokens_in_memory() const {
  std::int64_t tokens = parts_[0]->tokens_in_memory();
  for (const SwapPtr& part : parts_) tokens = std::min(tokens, part->tokens_in_memory());
  return tokens;
}

std::string JointSwap::error() const {
  for (const SwapPtr& part : parts_) {
    if (std::string error = part->error(); !error.empty()) return error;
  }
  return "";
}

bool JointSwap::Wait(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  const auto all = [&] {
    return std::all_of(parts_.begin(), parts_.end(), [&](const SwapPtr& part) {
      return part->Wait(std::chrono::duration<double>(until - Clock::now()).count());
    });
  };
  if (all()) return true;
  // When the release program had run on all devices, a handler may still have been using the slot.
  if (parts_[0]->state() == SwapState::kQueued) Continue();
  return all();
}

// ---- steps ----

bool JointSwap::Run(const std::vector<const PoolParts*>& pools, const JointSupply& supply) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (std::exchange(written_, false)) EndWrites(pools, supply);
  if (std::exchange(read_, false)) EndReads(pools, supply);
  if (dropped_) {
    for (std::size_t i = 0; i < pools.size(); ++i) {
      steps::Drop(*pools[i], supply.lock(i), parts_[i], &unwanted_.emplace_back());
    }
  }
  submit_reads_ |=
      std::all_of(reads_.begin(), reads_.end(), [](const Read& read) { return read.read.image != nullptr; });
  if (parts_[0]->state() != SwapState::kQueued) return true;
  const auto all = [&](bool (*is)(const PoolParts&, const Swap&)) {
    for (std::size_t i = 0; i < pools.size(); ++i) {
      if (!is(*pools[i], *parts_[i])) return false;
    }
    return true;
  };
  if (!all(&steps::Vacated)) return true;  // the release program will call Continue again
  if (!all(&steps::Idle)) return false;
  Capture(pools, supply);
  return true;
}

void JointSwap::Capture(const std::vector<const PoolParts*>& pools, const JointSupply& supply) {
  for (std::size_t i = 0; i < pools.size(); ++i) steps::Find(*pools[i], supply.lock(i), parts_[i].get());
  std::size_t tokens = parts_[0]->ids.size();
  std::int64_t kept = 0;
  bool wanted = false;
  for (const SwapPtr& part : parts_) {
    tokens = std::min(tokens, part->ids.size());
    kept = std::max(kept, part->kept);
    wanted |= part->wanted;
  }
  std::size_t writes = 0;
  for (std::size_t i = 0; i < pools.size(); ++i) {
    parts_[i]->wanted = wanted;
    steps::Limit(*pools[i], static_cast<std::int64_t>(tokens), kept, parts_[i].get());
    writes += steps::Take(*pools[i], supply.lock(i), parts_[i]);
  }
  if (writes == 0) return;  // otherwise all parts are written: they have the same number of blocks
  for (std::size_t i = 0; i < pools.size(); ++i) {
    // Cannot fail: swap_out has already created the mover.
    static_cast<void>(
        swapping::DescribeWrite(&pools[i]->supply->arena(supply.lock(i)), parts_[i], &writes_.emplace_back()));
  }
  images_.assign(parts_.size(), nullptr);
  writing_ = parts_.size();
}

void JointSwap::EndWrites(const std::vector<const PoolParts*>& pools, const JointSupply& supply) {
  const bool all = std::all_of(images_.begin(), images_.end(), [](const auto& image) { return image != nullptr; });
  for (std::size_t i = 0; i < pools.size(); ++i) {
    if (!all) unwanted_.push_back(std::exchange(images_[i], nullptr));
    steps::EndWrite(*pools[i], supply.lock(i), parts_[i], &images_[i]);
    unwanted_.push_back(std::move(images_[i]));
  }
}

void JointSwap::EndReads(const std::vector<const PoolParts*>& pools, const JointSupply& supply) {
  const auto worst =
      std::min_element(reads_.begin(), reads_.end(), [](const Read& a, const Read& b) { return a.good < b.good; });
  const auto failed = std::find_if(reads_.begin(), reads_.end(),
                                   [](const Read& read) { return read.problem != store::Problem::kNone; });
  const store::Problem problem = failed == reads_.end() ? store::Problem::kNone : failed->problem;
  for (std::size_t i = 0; i < pools.size(); ++i) {
    steps::EndRead(*pools[i], supply.lock(i), parts_[i], problem, worst->good);
  }
  for (Read& read : reads_) read = {};
}

void JointSwap::After() {
  std::vector<store::SwapWrite> writes;
  std::vector<store::SwapRead> reads;
  Images unwanted;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    writes.swap(writes_);
    unwanted.swap(unwanted_);
    if (std::exchange(submit_reads_, false)) {
      for (Read& read : reads_) reads.push_back(std::exchange(read.read, {}));
      reading_ = reads.size();
    }
  }
  unwanted.clear();
  for (std::size_t i = 0; i < writes.size(); ++i) SubmitWrite(i, std::move(writes[i]));
  for (std::size_t i = 0; i < reads.size(); ++i) SubmitRead(i, std::move(reads[i]));
}

void JointSwap::Abandon() {
  std::vector<store::SwapWrite> writes;
  Images images, unwanted;
  const std::lock_guard<std::mutex> lock(mutex_);
  writes.swap(writes_);
  images.swap(images_);
  unwanted.swap(unwanted_);
  images_.resize(images.size());  // for writes still in flight
  for (Read& read : reads_) read = {};
}

// ---- called by the store ----

void JointSwap::SubmitWrite(std::size_t pool, store::SwapWrite write) {
  // The store reads from the pool's memory.
  write.done = [owner = parts_[pool]->pool.lock(), self = shared_from_this(), pool](
                   const Status&, std::shared_ptr<store::SwapImage> image) {
    self->WriteEnded(pool, std::move(image));
  };
  if (const std::shared_ptr<store::SwapStore> store = parts_[pool]->store.lock(); store != nullptr) {
    store->WriteSwapped(std::move(write));
  } else {
    write.done({}, nullptr);
  }
}

void JointSwap::SubmitRead(std::size_t pool, store::SwapRead read) {
  read.done = [owner = parts_[pool]->pool.lock(), self = shared_from_this(), pool](
                  store::Problem problem, std::int64_t good) { self->ReadEnded(pool, problem, good); };
  if (const std::shared_ptr<store::SwapStore> store = parts_[pool]->store.lock(); store != nullptr) {
    store->ReadSwapped(std::move(read));
  } else {
    read.done(store::Problem::kClosed, 0);
  }
}

void JointSwap::WriteEnded(std::size_t pool, std::shared_ptr<store::SwapImage> image) {
  // One part failed, so the other parts' writes are useless.
  if (image == nullptr) {
    for (const SwapPtr& part : parts_) part->StopCopies();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    images_[pool] = std::move(image);
    if (--writing_ > 0) return;
    written_ = true;
  }
  Continue();
}

void JointSwap::ReadEnded(std::size_t pool, store::Problem problem, std::int64_t good) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    reads_[pool].problem = problem;
    reads_[pool].good = good;
    if (--reading_ > 0) return;
  }
  // Nothing else accesses the images during a read. They are kept only for a retry, and only if all parts can be kept.
  const auto failed = [](const Read& read) { return read.problem != store::Problem::kNone; };
  const auto outlives = [](const SwapPtr& part) { return part->image->outlives_failures(); };
  const bool again =
      std::any_of(reads_.begin(), reads_.end(), failed) && std::all_of(parts_.begin(), parts_.end(), outlives);
  if (!again) {
    for (const SwapPtr& part : parts_) part->image = nullptr;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    read_ = true;
  }
  Continue();
}

}  // namespace kvpage
