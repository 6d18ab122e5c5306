#include "store/catalog.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <utility>

#include "store/block_file.h"

namespace kvpage::store {
namespace {

// A change right after a listing may not change the folder's modification time.
constexpr double kClockTick = 2;
// Rounds of Maintain between two checks for files that dead writers left behind.
constexpr std::int64_t kOrphanRounds = 64;
// Listing the folder before a write takes at most one in this many seconds; other processes may have written meanwhile.
constexpr double kListingShare = 20;
// How long files that the system refused to read are left alone.
constexpr std::chrono::seconds kRetryAfter{1};
// Weight of earlier reads, relative to the latest, in the read speed.
constexpr double kReadMemory = 0.75;

}  // namespace

Catalog::Catalog(Folder folder, const StoreOptions& options) : folder_(std::move(folder)), options_(options) {
  numbers_.limit_bytes = options.limit_bytes;
  numbers_.missed.resize(kNumProblems);
  folder_.RemoveOrphans();  // a process that only saves or loads once has no later opportunity
}

std::vector<StoredPart> Catalog::Find(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return directory_.Find(identity, tokens, count);
}

std::int64_t Catalog::LookUp(const Identity& identity, const std::int32_t* tokens, std::int64_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<StoredPart> parts = directory_.Find(identity, tokens, count);
  const std::int64_t found = parts.empty() ? 0 : parts.back().end * identity.shape.block_tokens;
  if (found == 0 && directory_.OtherShape(identity)) ++numbers_.missed[static_cast<int>(Problem::kGeometry)];
  ++numbers_.lookups;
  numbers_.tokens_asked += count;
  numbers_.tokens_found += found;
  return found;
}

std::vector<StoredRun> Catalog::Runs(const BlockShape& shape) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return directory_.Runs(shape, options_.fingerprint);
}

std::vector<StoredRun> Catalog::Lost(const BlockShape& shape, std::int64_t* seen) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lost_.Since(shape, options_.fingerprint, seen);
}

void Catalog::NoteLost(const std::string& name) {
  Identity identity;
  StoredRun run = directory_.RunOf(name, &identity);
  if (identity.fingerprint == options_.fingerprint) lost_.Add(std::move(identity), std::move(run));
}

void Catalog::Add(const std::string& name, std::int64_t bytes, const FileHeader& header) {
  const std::lock_guard<std::mutex> lock(mutex_);
  directory_.Add(name, bytes, header);
}

void Catalog::NoteProblem(const std::string& name, Problem problem) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++numbers_.missed[static_cast<int>(problem)];
  if (problem == Problem::kClosed || !directory_.Has(name)) return;
  NoteLost(name);
  if (problem == Problem::kGone) {
    directory_.Remove(name);
  } else {
    directory_.Refuse(name, problem);
  }
}

void Catalog::NoteError(const Status& status) {
  if (status.ok()) return;
  Count([&](StoreNumbers* numbers) { numbers->last_error = status.message(); });
}

void Catalog::NoteRead(std::int64_t bytes, double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  recent_bytes_ = kReadMemory * recent_bytes_ + static_cast<double>(bytes);
  recent_seconds_ = kReadMemory * recent_seconds_ + seconds;
}

double Catalog::read_bytes_per_second() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return recent_seconds_ > 0 ? recent_bytes_ / recent_seconds_ : 0;
}

void Catalog::NoteSwapOut(double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  swap_outs_.Add(seconds);
}

void Catalog::NoteSwapIn(double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  swap_ins_.Add(seconds);
}

bool Catalog::Changed(double* time) const {
  *time = folder_.ChangeTime();
  return *time != changed_ || Folder::Now() - *time <= kClockTick;
}

bool Catalog::Retries() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return directory_.refused()[static_cast<int>(Problem::kUnreadable)] > 0 && Clock::now() - listed_ >= kRetryAfter;
}

Status Catalog::Refresh(bool force) {
  const std::lock_guard<std::mutex> refresh(refresh_mutex_);
  double time;
  if (!Changed(&time) && !force && !Retries()) return {};
  const Clock::time_point begun = Clock::now();
  std::vector<FolderEntry> entries;
  KVPAGE_RETURN_IF_ERROR(folder_.List(&entries));
  changed_ = time;
  listed_ = begun;
  next_listing_ = begun + std::chrono::duration_cast<Clock::duration>(kListingShare * (Clock::now() - begun));
  std::map<std::string, std::uint64_t> inodes;
  for (const FolderEntry& entry : entries) {
    inodes[entry.name] = entry.inode;
    // Files written by this process since the last refresh are already listed.
    const auto known = inodes_.find(entry.name);
    const bool same = known == inodes_.end() || known->second == entry.inode;
    if (same && Usable(entry.name)) continue;
    BlockFile file;
    const Problem problem = file.Open(options_.io.get(), folder_, entry.name);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (problem == Problem::kGone) {
      NoteLost(entry.name);
      directory_.Remove(entry.name);
    } else if (problem != Problem::kNone) {
      NoteLost(entry.name);
      directory_.AddRefused(entry.name, entry.bytes, problem);
    } else {
      directory_.Add(entry.name, entry.bytes, file.header());
    }
  }
  inodes_.swap(inodes);
  std::vector<std::string> gone;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    gone = directory_.Names();
  }
  // A file may have been written since the listing.
  const auto here = [&](const std::string& name) { return inodes_.count(name) > 0 || folder_.Has(name); };
  gone.erase(std::remove_if(gone.begin(), gone.end(), here), gone.end());
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::string& name : gone) {
    NoteLost(name);
    directory_.Remove(name);
  }
  return {};
}

bool Catalog::Usable(const std::string& name) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Problem problem = directory_.ProblemOf(name);
  // Files that the system refused to read once are tried again.
  return problem != Problem::kGone && problem != Problem::kUnreadable;
}

std::int64_t Catalog::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return directory_.bytes() + swapped_bytes_;
}

bool Catalog::ReserveSwapped(std::int64_t bytes) {
  const auto count = [&](std::int64_t more) {
    const std::lock_guard<std::mutex> lock(mutex_);
    swapped_bytes_ += more;
    return swapped_bytes_ <= options_.limit_bytes;
  };
  if (count(bytes) && (bytes <= 0 || Evict(options_.limit_bytes))) return true;
  if (bytes <= 0) return true;
  count(-bytes);
  return false;
}

bool Catalog::Evict(std::int64_t limit, const std::set<std::string>& kept) {
  if (bytes() <= limit) {
    if (options_.limit_bytes == std::numeric_limits<std::int64_t>::max()) return true;
    if (Clock::now() >= next_listing_.load()) NoteError(Refresh(/*force=*/false));
    if (bytes() <= limit) return true;
  }
  const FolderLock held = folder_.TryLock();
  if (!held.ok()) return true;  // the process that is evicting now, or the next one, removes enough
  NoteError(Refresh(/*force=*/true));
  std::vector<FolderEntry> entries;
  if (const Status status = folder_.List(&entries); !status.ok()) {
    NoteError(status);
    return true;
  }
  std::map<std::string, double> used;
  for (const FolderEntry& entry : entries) used[entry.name] = entry.used;
  std::vector<std::string> plan;
  std::vector<std::int64_t> sizes;
  // Not bytes() at the end: for what other threads and processes add meanwhile, they make room themselves.
  std::int64_t left = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    plan = directory_.PlanEviction(limit - swapped_bytes_, used, kept);
    for (const std::string& name : plan) sizes.push_back(directory_.BytesOf(name));
    left = directory_.bytes() + swapped_bytes_;
  }
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const std::string& name = plan[i];
    if (!folder_.Remove(name)) {
      NoteError(FileError("remove " + name + " from " + folder_.path(), errno));
      continue;
    }
    left -= sizes[i];
    const std::lock_guard<std::mutex> lock(mutex_);
    NoteLost(name);
    directory_.Remove(name);  // unless a refresh has found that the file is gone
    ++numbers_.files_evicted;
    numbers_.bytes_evicted += sizes[i];
  }
  return left <= limit;
}

void Catalog::Maintain() {
  NoteError(Refresh(/*force=*/false));
  static_cast<void>(Evict(options_.limit_bytes));
  if (++rounds_ % kOrphanRounds == 0) folder_.RemoveOrphans();
}

StoreNumbers Catalog::Numbers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  StoreNumbers numbers = numbers_;
  numbers.files = directory_.num_files();
  numbers.bytes = directory_.bytes();
  numbers.bytes_swapped = swapped_bytes_;
  if (recent_seconds_ > 0) numbers.read_bytes_per_second = recent_bytes_ / recent_seconds_;
  numbers.swap_outs = swap_outs_.numbers();
  numbers.swap_ins = swap_ins_.numbers();
  numbers.refused = directory_.refused();
  numbers.refused[static_cast<int>(Problem::kFingerprint)] += directory_.CountForeign(options_.fingerprint);
  return numbers;
}

}  // namespace kvpage::store
