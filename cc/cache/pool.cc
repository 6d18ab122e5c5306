// The host side of the pool: claims, releases, generations, capacity.
#include "cache/pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "cache/messages.h"

namespace kvpage {
namespace {

std::atomic<int> g_fork_count{0};

[[maybe_unused]] const int g_fork_hook = pthread_atfork(nullptr, nullptr, [] { g_fork_count.fetch_add(1); });

std::string Number(std::int64_t value) { return std::to_string(value); }

Claim Failed(Status status) {
  Claim claim;
  claim.status = std::move(status);
  return claim;
}

}  // namespace

int ForkCount() { return g_fork_count.load(); }

Pool::Pool(const Geometry& geometry, const PoolOptions& options, std::unique_ptr<Arena> arena, std::int64_t map_limit,
           std::unique_ptr<Mirror> mirror)
    : geometry_(geometry),
      options_(options),
      arena_(std::move(arena)),
      map_limit_(map_limit),
      fork_count_(ForkCount()),
      mirror_(std::move(mirror)),
      slots_(geometry.max_slots),
      seen_(geometry.max_slots, 0) {
  for (Slot& slot : slots_) slot.written.assign(geometry.num_layers, 0);
}

Status Pool::Make(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options,
                  std::unique_ptr<Vmm> vmm, std::int64_t map_limit, std::shared_ptr<Pool>* out,
                  std::unique_ptr<Mirror> mirror) {
  const std::int64_t blocks = capacity_bytes / geometry.block_bytes;
  if (blocks < geometry.num_ranges()) {
    return InvalidArgument("capacity is " + Number(capacity_bytes) + " bytes, " + Number(blocks) +
                           " blocks; the first token of a request takes " + Number(geometry.num_ranges()) +
                           " blocks of " + Number(geometry.block_bytes) +
                           " bytes: give more capacity or a smaller block_tokens");
  }
  std::unique_ptr<Arena> arena;
  KVPAGE_RETURN_IF_ERROR(Arena::Make(geometry, blocks, std::move(vmm), &arena));
  std::shared_ptr<Pool> pool(new Pool(geometry, options, std::move(arena), map_limit, std::move(mirror)));
  KVPAGE_RETURN_IF_ERROR(pool->CheckMapLimit(blocks));
  *out = std::move(pool);
  return {};
}

Status Pool::CheckMapLimit(std::int64_t blocks) const {
  // At worst no two mapped blocks are neighbours, and every range that has some ends in a hole.
  const std::int64_t worst = blocks + std::min(blocks, geometry_.max_slots * geometry_.num_ranges()) + 1;
  if (map_limit_ <= 0 || worst <= map_limit_) return {};
  const std::int64_t factor = (worst + map_limit_ - 1) / map_limit_;
  return InvalidArgument(Number(blocks) + " blocks of " + Number(geometry_.block_bytes) + " bytes may need " +
                         Number(worst) + " memory mappings; the system allows this process " + Number(map_limit_) +
                         " more: use block_tokens of at least " + Number(geometry_.block_tokens * factor) +
                         ", a smaller capacity, or raise vm.max_map_count (sysctl)");
}

Status Pool::CheckProcess(const char* op) const {
  if (ForkCount() == fork_count_) return {};
  return FailedPrecondition(
      std::string(op) + ": pool " + Number(id_) +
          " was made before this process was forked and works in its own process only: make a new "
          "pool here (with the `spawn` or `forkserver` start method, as JAX itself needs)",
      Reason::kForked);
}

Status Pool::CheckOpen(const char* op) const { return closed_ ? messages::Closed(op, id_) : Status(); }

Status Pool::CheckOccupied(const char* op, std::int32_t slot) const {
  if (slot < 0 || slot >= geometry_.max_slots) {
    return InvalidArgument(std::string(op) + ": slot " + Number(slot) + " does not exist, slots are 0.." +
                           Number(geometry_.max_slots - 1));
  }
  if (slots_[slot].state == SlotState::kOccupied) return {};
  return FailedPrecondition(
      std::string(op) + ": slot " + Number(slot) + " is " +
      (slots_[slot].state == SlotState::kFree ? "free: acquire it first" : "draining: it was released"));
}

Claim Pool::Acquire(const std::vector<std::int64_t>& tokens) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    if (Status status = Enter("acquire"); !status.ok()) return Failed(status);
  }
  for (std::int64_t n : tokens) {
    if (n < 0 || n > geometry_.max_seq_len) {
      return Failed(InvalidArgument("acquire: num_tokens is " + Number(n) + ", wanted 0.." +
                                    Number(geometry_.max_seq_len) + " (max_seq_len)"));
    }
  }
  std::vector<Want> wants;
  std::vector<bool> taken(geometry_.max_slots, false);
  for (std::int64_t n : tokens) {
    const std::int32_t slot = BestFit(geometry_.BlocksFor(n), taken);
    if (slot < 0) {
      Claim claim = Failed(ResourceExhausted("no free slot", Reason::kOutOfSlots));
      claim.wanted = static_cast<std::int64_t>(tokens.size());
      claim.free = static_cast<std::int64_t>(wants.size());
      const std::lock_guard<std::mutex> state(state_mutex_);
      claim.draining = NumDraining();
      return claim;
    }
    taken[slot] = true;
    wants.push_back({slot, geometry_.BlocksFor(n)});
  }
  // Adopted memory is blanked before anybody may see it; what Reserve maps on top is blanked there.
  const std::vector<std::int64_t> adopted = Held(wants);
  Claim claim = Reserve(wants);
  if (!claim.status.ok()) return claim;
  for (std::size_t i = 0; i < wants.size(); ++i) {
    claim.status = Blank(wants[i].slot, 0, std::min(adopted[i], arena_->blocks(wants[i].slot)));
    if (claim.status.ok()) continue;
    for (std::size_t k = 0; k < wants.size(); ++k) static_cast<void>(arena_->Shrink(wants[k].slot, adopted[k]));
    return claim;
  }
  claim.status = PublishRoom(wants, adopted);
  if (!claim.status.ok()) return claim;
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (std::size_t i = 0; i < wants.size(); ++i) {
    slots_[wants[i].slot].Occupy(tokens[i]);
    if (mirror_ != nullptr) mirror_->ClearVacated(wants[i].slot);
    claim.slots.push_back(wants[i].slot);
  }
  return claim;
}

Claim Pool::Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
  const auto check = [&]() -> Status {  // state_mutex_ held
    KVPAGE_RETURN_IF_ERROR(Enter("extend"));
    ++stamp_;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      KVPAGE_RETURN_IF_ERROR(CheckOccupied("extend", slots[i]));
      if (seen_[slots[i]] == stamp_) return InvalidArgument("extend: slot " + Number(slots[i]) + " is named twice");
      seen_[slots[i]] = stamp_;
      if (tokens[i] < 0 || tokens[i] > geometry_.max_seq_len) {
        return messages::MaxSeqLen("extend", slots[i], tokens[i], geometry_.max_seq_len);
      }
    }
    return {};
  };
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    if (Status status = check(); !status.ok()) return Failed(status);
    bool enough = true;
    for (std::size_t i = 0; i < slots.size(); ++i) enough &= tokens[i] <= slots_[slots[i]].reserved;
    if (enough) return {};
  }
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  std::vector<Want> wants;
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    if (Status status = check(); !status.ok()) return Failed(status);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      wants.push_back({slots[i], geometry_.BlocksFor(std::max(tokens[i], slots_[slots[i]].reserved))});
    }
  }
  const std::vector<std::int64_t> before = Held(wants);
  Claim claim = Reserve(wants);
  if (claim.status.ok()) claim.status = PublishRoom(wants, before);
  if (!claim.status.ok()) return claim;
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    Slot& row = slots_[slots[i]];
    // A release may have begun meanwhile; the memory then parks with the slot.
    if (row.state == SlotState::kOccupied) row.reserved = std::max(row.reserved, tokens[i]);
  }
  return claim;
}

Status Pool::StartRelease(const std::vector<std::int32_t>& slots) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(Enter("release"));
  ++stamp_;
  for (std::int32_t slot : slots) {
    KVPAGE_RETURN_IF_ERROR(CheckOccupied("release", slot));
    if (seen_[slot] == stamp_) return InvalidArgument("release: slot " + Number(slot) + " is named twice");
    seen_[slot] = stamp_;
  }
  for (std::int32_t slot : slots) slots_[slot].state = SlotState::kDraining;
  return {};
}

void Pool::UndoAcquire(const std::vector<std::int32_t>& slots) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (std::int32_t slot : slots) {
    slots_[slot].state = SlotState::kDraining;
    slots_[slot].vacated = true;
    FinishDraining(slot);
  }
}

void Pool::UndoRelease(const std::vector<std::int32_t>& slots) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  for (std::int32_t slot : slots) {
    if (slots_[slot].state == SlotState::kDraining && !slots_[slot].vacated) slots_[slot].state = SlotState::kOccupied;
  }
}

Status Pool::Commit(std::int32_t slot, const std::vector<std::int32_t>& token_ids) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(Enter("commit"));
  KVPAGE_RETURN_IF_ERROR(CheckOccupied("commit", slot));
  Slot& row = slots_[slot];
  const auto wanted = static_cast<std::int64_t>(row.committed.size() + token_ids.size());
  if (wanted > Room(row)) {
    return OutOfRange("commit: slot " + Number(slot) + ": " + Number(wanted) + " tokens wanted, " + Number(Room(row)) +
                      " mapped: extend the slot before its tokens are written");
  }
  row.committed.insert(row.committed.end(), token_ids.begin(), token_ids.end());
  return {};
}

std::vector<std::int32_t> Pool::Committed(std::int32_t slot) {
  const std::lock_guard<std::mutex> state(state_mutex_);
  const bool occupied = slot >= 0 && slot < geometry_.max_slots && slots_[slot].state == SlotState::kOccupied;
  return occupied ? slots_[slot].committed : std::vector<std::int32_t>();
}

void Pool::FinishDraining(std::int64_t slot) {
  Slot& row = slots_[slot];
  if (row.state != SlotState::kDraining || !row.vacated || row.pins > 0 || row.views > 0) return;
  row.state = SlotState::kFree;
  row.vacated = false;
  row.reserved = row.length = 0;
  row.committed.clear();
  row.parked_at = ++parkings_;
  changed_.notify_all();
}

Status Pool::NewGeneration(Generation* out) {
  if (mirror_ != nullptr) return NewGenerationOnDevice(out);
  std::unique_lock<std::mutex> state(state_mutex_);
  KVPAGE_RETURN_IF_ERROR(CheckOpen("cache"));
  if (running_ > 0) ++waits_;
  changed_.wait(state, [this] { return running_ == 0 || closed_; });
  KVPAGE_RETURN_IF_ERROR(CheckOpen("cache"));
  ++generation_;
  NextEpoch();
  out->generation = generation_;
  out->epoch = epoch_;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& row = slots_[i];
    row.since = epoch_;
    if (row.state == SlotState::kDraining) {
      row.vacated = true;  // its program belongs to the old generation and will be refused
      FinishDraining(static_cast<std::int64_t>(i));
    }
    // Rows beyond the restored length may be half written; nobody may count on them.
    for (std::int32_t& written : row.written) written = std::min(written, row.length);
    out->lengths.push_back(row.state == SlotState::kOccupied ? row.length : -1);
  }
  return {};
}

bool Pool::WaitForDrain(double seconds) {
  if (mirror_ != nullptr) return PollForDrain(seconds);
  std::unique_lock<std::mutex> state(state_mutex_);
  const std::int64_t before = NumDraining();
  if (before == 0) return false;
  return changed_.wait_for(state, std::chrono::duration<double>(seconds),
                           [&] { return NumDraining() < before || closed_; });
}

std::int64_t Pool::NumDraining() const {
  return std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.state == SlotState::kDraining; });
}

Status Pool::Trim(std::int64_t* freed_blocks) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    KVPAGE_RETURN_IF_ERROR(Enter("trim"));
  }
  for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
    KVPAGE_RETURN_IF_ERROR(arena_->Shrink(slot, Floor(slot, {})));
  }
  *freed_blocks = arena_->Trim();
  return {};
}

Claim Pool::Resize(std::int64_t capacity_bytes) {
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  {
    const std::lock_guard<std::mutex> state(state_mutex_);
    if (Status status = Enter("resize"); !status.ok()) return Failed(status);
  }
  const std::int64_t budget = capacity_bytes / geometry_.block_bytes;
  if (budget < geometry_.num_ranges()) {
    return Failed(InvalidArgument("resize: capacity is " + Number(capacity_bytes) + " bytes, wanted at least " +
                                  Number(geometry_.num_ranges()) + " blocks of " + Number(geometry_.block_bytes)));
  }
  if (Status status = CheckMapLimit(budget); !status.ok()) return Failed(status);
  Claim claim;
  claim.wanted = arena_->pool().num_used() - budget;
  if (claim.wanted > 0) {
    Tally({}, &claim);
    if (claim.wanted > claim.reclaimable) {
      claim.status = ResourceExhausted(Number(claim.wanted) + " blocks must be given up, " + Number(claim.reclaimable) +
                                           " reclaimable, " + Number(claim.draining) + " draining",
                                       Reason::kOutOfBlocks);
      return claim;
    }
    claim.status = Steal(claim.wanted);
    if (!claim.status.ok()) return claim;
  }
  claim.status = arena_->SetBudget(budget);
  return claim;
}

void Pool::Close() {
  std::unique_lock<std::mutex> state(state_mutex_);
  closed_ = true;
  changed_.notify_all();
  if (running_ > 0) ++waits_;
  changed_.wait(state, [this] { return running_ == 0; });
  if (mirror_ == nullptr) return;
  // Handlers of map_slots that wait for the mapping mutex will find the pool closed: none of them waits for the device
  // while it holds it.
  state.unlock();
  const std::lock_guard<std::mutex> mapping(mapping_mutex_);
  mirror_->Close();
}

}  // namespace kvpage
