#include "cache/prefix_spill.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/staging.h"
#include "cache/prefix_copies.h"
#include "cache/prefix_store_parts.h"

namespace kvpage::prefix {
namespace {

using Clock = std::chrono::steady_clock;

// Size of a run's blocks, which are copied before they are written, and bytes copied each time the mapping mutex is
// held.
constexpr std::int64_t kRunBytes = std::int64_t{32} << 20, kCopyBytes = std::int64_t{2} << 20;
// One run is copied while another is written.
constexpr int kMostRuns = 2;
// How long to wait after a failed write.
constexpr std::chrono::seconds kPause{1};

}  // namespace

// Consecutive blocks of a sequence to be written to the store.
struct Spiller::Run {
  std::int32_t space = -1;
  std::string name;  // name of the namespace
  std::vector<std::int32_t> tokens;
  std::int64_t first_block = 0, copied = 0;  // what is written
  std::int64_t marked = 0;                   // the index counts blocks from here on as being written
  Staging bytes;                             // kept for the next run
  std::int64_t room = 0;                     // in blocks
  std::shared_ptr<CachedCopies> copies;      // used instead of `bytes` for a store that copies
  Clock::time_point begun;
};

void Spiller::Wake() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    if (closed_ || runs_ >= kMostRuns || Clock::now() < pause_) return;
    ++runs_;
  }
  Queue(std::make_shared<Run>());
}

void Spiller::Queue(const std::shared_ptr<Run>& run) {
  store::WriteRun write;
  write.shape = shape_;
  write.fill = [self = shared_from_this(), run](store::WriteRun* filled) { return self->Fill(run.get(), filled); };
  write.done = [self = shared_from_this(), run](const Status& status) { self->Done(run, status); };
  if (store_.Write(write)) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  --runs_;
}

bool Spiller::Fill(Run* run, store::WriteRun* write) {
  bool found = false, again = true;
  while (!found && again) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      woken_ = false;
    }
    again = false;
    const bool alive = access_->With([&](const PoolParts& pool) { found = Choose(pool, run, &again); });
    const std::lock_guard<std::mutex> lock(mutex_);
    if (found) break;
    again = alive && !closed_ && (again || woken_);
    if (!again) --runs_;
  }
  if (!found) return false;
  run->begun = Clock::now();
  write->space = run->name;
  write->tokens = run->tokens;
  write->first_block = run->first_block;
  write->copier = run->copies;
  const std::int64_t ranges = run->copies != nullptr ? 0 : (run->copied - run->first_block) * shape_.ranges;
  for (std::int64_t i = 0; i < ranges; ++i) write->sources.push_back(run->bytes.get() + i * shape_.block_bytes);
  access_->With([&](const PoolParts&) { Wake(); });  // start copying the next run while this one is written
  return true;
}

bool Spiller::Wanted(const PoolParts& pool, const MappingLock& mapping, const PrefixIndex& index) const {
  const BlockPool& blocks = pool.supply->arena(mapping).pool();
  std::int64_t written = index.numbers().stored;  // or soon will be
  const StateLock state = pool.table->Lock();
  for (std::int32_t slot = 0; slot < pool.table->num_slots(); ++slot) {
    const HostSlot& row = pool.table->host(state, slot);
    // Blocks with which live sequences began may be written ones, but they are in use.
    if (!row.idle() && row.space >= 0) written -= row.found / shape_.block_tokens;
  }
  const std::int64_t ready = blocks.num_free() / shape_.ranges + std::max<std::int64_t>(written, 0);
  return static_cast<double>(ready * shape_.ranges) < share_ * static_cast<double>(blocks.budget());
}

void Spiller::NoteLost(const PoolParts& pool) {
  std::vector<store::StoredRun> runs;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    runs = store_.Lost(shape_, &lost_);
  }
  for (const store::StoredRun& run : runs) {
    // Another file may already have the blocks.
    const std::int64_t stored = store_.StoredBlocks(shape_, run.space, run.tokens);
    const MappingLock mapping = pool.supply->Lock();
    PrefixIndex* index = nullptr;
    if (!OpenIndexForThread(pool, mapping, "write ahead", &index).ok()) return;
    index->LoseWritten(index->Namespace(run.space), run.tokens.data(), static_cast<std::int64_t>(run.tokens.size()),
                       std::max(run.first_block, stored));
  }
}

bool Spiller::Choose(const PoolParts& pool, Run* run, bool* again) {
  NoteLost(pool);
  const std::int64_t most = std::max<std::int64_t>(kRunBytes / shape_.bytes(), 1);
  PrefixIndex::Unwritten chosen;
  {
    const MappingLock mapping = pool.supply->Lock();
    PrefixIndex* index = nullptr;
    if (const Status status = OpenIndexForThread(pool, mapping, "write ahead", &index); !status.ok()) {
      NoteFailure(status);
      return false;
    }
    if (!Wanted(pool, mapping, *index)) return false;
    const BlockPool& blocks = pool.supply->arena(mapping).pool();
    const auto unused = [&](const std::int32_t* entry, std::int32_t owner) {
      const bool parked = owner >= 0 && pool.table->host(pool.table->Lock(), owner).idle();
      return (owner < 0 || parked) && blocks.references(entry[0]) <= (parked ? 1 : 0);
    };
    if (!index->StartWrite(most, unused, &chosen)) return false;
    run->name = index->Namespaces()[chosen.space];
  }
  run->space = chosen.space;
  run->tokens = std::move(chosen.tokens);
  run->marked = run->first_block = run->copied = chosen.first_block;
  const auto end = static_cast<std::int64_t>(run->tokens.size()) / shape_.block_tokens;
  // Another writer may have stored the blocks, and the blocks before them may be gone from the store.
  const std::int64_t stored = store_.StoredBlocks(shape_, run->name, run->tokens);
  if (stored >= end) {
    EndWrite(pool, *run, /*ok=*/true);
    *again = true;
    return false;
  }
  if (stored > run->first_block || !chosen.behind_writes) run->first_block = run->copied = stored;
  const Status copies = StartCopies(pool, run, std::min(end, run->first_block + most));
  if (!copies.ok()) NoteFailure(copies);
  // The other blocks have been evicted or are not written yet.
  Shorten(pool, run, run->copied);
  *again = run->copied == run->first_block;
  return !*again;
}

Status Spiller::StartCopies(const PoolParts& pool, Run* run, std::int64_t stop) {
  if (mover_ != nullptr) {
    const MappingLock mapping = pool.supply->Lock();
    PrefixIndex* index = nullptr;
    KVPAGE_RETURN_IF_ERROR(OpenIndexForThread(pool, mapping, "write ahead", &index));
    std::vector<std::int32_t> tokens(run->tokens.begin(), run->tokens.begin() + stop * shape_.block_tokens);
    run->copies = std::make_shared<CachedCopies>(access_, mover_, pool, mapping, run->space, tokens, run->first_block);
    run->copied += run->copies->blocks();
    return {};
  }
  if (run->room < stop - run->first_block) {
    run->room = 0;
    run->bytes = NewStaging((stop - run->first_block) * shape_.bytes());
    run->room = stop - run->first_block;
  }
  const std::int64_t step = std::max<std::int64_t>(kCopyBytes / shape_.bytes(), 1);
  for (std::int64_t next = run->copied; run->copied == next && next < stop;) {
    next = std::min(next + step, stop);
    char* const out = run->bytes.get() + (run->copied - run->first_block) * shape_.bytes();
    KVPAGE_RETURN_IF_ERROR(CopyBlocks(pool, "write ahead", run->name, run->tokens, next, out, &run->copied));
  }
  return {};
}

void Spiller::NoteFailure(const Status& status) {
  if (status.reason() == Reason::kClosed) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  ++numbers_.failed;
  pause_ = Clock::now() + kPause;
}

void Spiller::Shorten(const PoolParts& pool, Run* run, std::int64_t blocks) const {
  if (blocks * shape_.block_tokens == static_cast<std::int64_t>(run->tokens.size())) return;
  EndWrite(pool, *run, /*ok=*/false);
  run->copied = blocks;
  run->tokens.resize(blocks * shape_.block_tokens);
}

void Spiller::EndWrite(const PoolParts& pool, const Run& run, bool ok) const {
  const MappingLock mapping = pool.supply->Lock();
  pool.supply->OpenIndex(mapping).EndWrite(run.space, run.tokens.data(), static_cast<std::int64_t>(run.tokens.size()),
                                           run.marked, ok);
}

void Spiller::Done(const std::shared_ptr<Run>& run, const Status& status) {
  const bool begun = run->space >= 0;
  const std::shared_ptr<CachedCopies> copies = std::exchange(run->copies, nullptr);
  // Some blocks may have been evicted while the store copied them.
  const std::int64_t copied = copies == nullptr ? run->copied : run->first_block + copies->End();
  if (begun) {
    access_->With([&](const PoolParts& pool) {
      Shorten(pool, run.get(), copied);
      EndWrite(pool, *run, status.ok());
    });
  }
  run->space = -1;
  if (!status.ok()) NoteFailure(status);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (begun) {
      const double seconds = std::chrono::duration<double>(Clock::now() - run->begun).count();
      numbers_.seconds += seconds;
      latencies_.Add(seconds);
    }
    if (status.ok()) {
      numbers_.tokens += (run->copied - run->first_block) * shape_.block_tokens;
      numbers_.bytes += (run->copied - run->first_block) * shape_.bytes();
    }
    if (!status.ok() || closed_) {
      --runs_;
      return;
    }
  }
  access_->With([&](const PoolParts&) { Queue(run); });  // the store may be destroyed with the pool
}

void Spiller::Close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
}

SpillNumbers Spiller::numbers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  SpillNumbers numbers = numbers_;
  numbers.latencies = latencies_.numbers();
  return numbers;
}

}  // namespace kvpage::prefix
