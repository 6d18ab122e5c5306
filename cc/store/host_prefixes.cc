#include "store/host_prefixes.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <utility>

namespace kvpage::store {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kAnyNumber = std::numeric_limits<std::int64_t>::max();
// Bytes copied between two checks for cancellation.
constexpr std::int64_t kCopyBytes = std::int64_t{8} << 20;
// Weight of the newest measurement in the moving average.
constexpr double kNewest = 0.25;

std::string Number(std::int64_t value) { return std::to_string(value); }
Status Closed() { return FailedPrecondition("the store was closed before the blocks were copied", Reason::kClosed); }

}  // namespace

struct HostPrefixes::Run {
  Run(std::shared_ptr<HostMemory> from, std::int64_t block_bytes, std::vector<HostBuffer> taken)
      : memory(std::move(from)), bytes(block_bytes), blocks(std::move(taken)) {}
  ~Run() { memory->Return(bytes, std::move(blocks)); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void Shorten(std::int64_t count) {
    memory->Return(bytes, {std::make_move_iterator(blocks.begin() + count), std::make_move_iterator(blocks.end())});
    blocks.resize(count);
  }

  const std::shared_ptr<HostMemory> memory;
  const std::int64_t bytes;  // per block
  std::vector<HostBuffer> blocks;
  double used = 0;
};

// Blocks to be read, as pieces of consecutive blocks of one run each.
struct HostPrefixes::ReadOrder {
  struct Piece {
    std::shared_ptr<Run> run;
    std::int64_t begin = 0, count = 0;
  };
  ReadRequest request;
  std::vector<Piece> pieces;
  Problem problem = Problem::kNone;  // why the pieces do not cover the request
  Clock::time_point begun = Clock::now();
};

HostPrefixes::HostPrefixes(std::shared_ptr<HostMemory> memory) : memory_(std::move(memory)) {}

HostPrefixes::~HostPrefixes() { Stop(); }

std::string HostPrefixes::NewOwner() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return *owners_.insert("pool " + Number(++num_owners_)).first;
}

void HostPrefixes::Forget(const std::string& owner) {
  std::vector<std::shared_ptr<Run>> gone;  // freed after the lock is released, as that may take a while
  const std::lock_guard<std::mutex> lock(mutex_);
  owners_.erase(owner);
  for (const std::string& name : directory_.Names()) {
    Identity identity;
    static_cast<void>(directory_.RunOf(name, &identity));
    if (identity.fingerprint == owner) gone.push_back(Take(name));
  }
}

std::shared_ptr<HostPrefixes::Run> HostPrefixes::Take(const std::string& name) {
  const auto found = runs_.find(name);
  std::shared_ptr<Run> run = std::move(found->second);
  runs_.erase(found);
  directory_.Remove(name);
  return run;
}

std::int64_t HostPrefixes::StoredBlocks(const Identity& identity, const std::int32_t* tokens,
                                        std::int64_t count) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<StoredPart> parts = directory_.Find(identity, tokens, count);
  return parts.empty() ? 0 : parts.back().end;
}

std::vector<StoredRun> HostPrefixes::Lost(const BlockShape& shape, const std::string& owner, std::int64_t* seen) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lost_.Since(shape, owner, seen);
}

bool HostPrefixes::MakeRoom(std::int64_t bytes, const std::set<std::string>& kept) {
  std::vector<std::shared_ptr<Run>> gone;  // freed after the lock is released
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::int64_t missing = bytes - memory_->room();
  if (missing <= 0) return true;
  std::set<std::string> stay = kept;
  std::map<std::string, double> used;
  for (const auto& [name, run] : runs_) {
    used[name] = run->used;
    if (run.use_count() > 1) stay.insert(name);  // being read
  }
  const std::int64_t before = directory_.bytes();
  std::int64_t left = before;
  const std::vector<std::string> plan = directory_.PlanEviction(before - missing, used, stay);
  for (const std::string& name : plan)
    left -= static_cast<std::int64_t>(runs_[name]->blocks.size()) * runs_[name]->bytes;
  if (before - left < missing) return false;
  for (const std::string& name : plan) {
    Identity identity;
    StoredRun run = directory_.RunOf(name, &identity);
    lost_.Add(std::move(identity), std::move(run));
    gone.push_back(Take(name));
  }
  numbers_.bytes_evicted += before - left;
  return true;
}

bool HostPrefixes::Write(const std::string& owner, WriteRun& run) {
  const std::lock_guard<std::mutex> lock(queues_mutex_);
  if (stopped_) return false;
  try {
    if (writes_ == nullptr) {
      writes_ = std::make_unique<WorkQueue<WriteOrder>>(1, kAnyNumber, [this](WriteOrder& each) { WorkOn(each); });
    }
  } catch (const std::exception&) {  // cannot start a thread
    return false;
  }
  WriteOrder order{owner, std::move(run)};
  if (writes_->Offer(order, 0)) return true;
  run = std::move(order.run);
  return false;
}

void HostPrefixes::WorkOn(WriteOrder& order) {
  Status status;
  try {
    if (order.run.fill && !order.run.fill(&order.run)) return;
    status = Store(order);
  } catch (const std::exception& error) {  // such as std::bad_alloc
    status = Internal(std::string("copying blocks to host memory: ") + error.what());
  }
  if (order.run.copier != nullptr) order.run.copier->End();
  if (!status.ok() && status.reason() != Reason::kClosed) {
    const bool full = status.code() == Code::kResourceExhausted;
    NoteError(status, full ? &HostPrefixNumbers::refused_writes : &HostPrefixNumbers::failed_writes);
  }
  const auto done = std::move(order.run.done);
  order.run.copier.reset();
  if (done) done(status);
}

Status HostPrefixes::Store(const WriteOrder& order) {
  const WriteRun& run = order.run;
  const Identity identity{run.shape, order.owner, run.space};
  std::set<std::string> kept;
  std::int64_t stored = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto count = static_cast<std::int64_t>(run.tokens.size());
    for (const StoredPart& part : directory_.Find(identity, run.tokens.data(), count)) {
      kept.insert(part.file);
      stored = part.end;
      runs_[part.file]->used = ++uses_;
    }
  }
  if (stored < run.first_block) {
    return ResourceExhausted("what blocks of a sequence continue is no longer in host memory");
  }
  const std::int64_t skipped = stored - run.first_block, count = run.copier->blocks() - skipped;
  if (count <= 0) return {};
  if (!MakeRoom(count * run.shape.bytes(), kept)) {
    return ResourceExhausted(Number(count * run.shape.bytes()) + " bytes of a sequence do not fit in a store of " +
                             Number(memory_->limit_bytes()) + " bytes of host memory, of which " +
                             Number(memory_->used_bytes()) + " are taken");
  }
  std::shared_ptr<Run> blocks;
  KVPAGE_RETURN_IF_ERROR(Fill(run, skipped, &blocks));
  return blocks->blocks.empty() ? Status() : AddRun(identity, run, stored, blocks);
}

Status HostPrefixes::Fill(const WriteRun& run, std::int64_t skipped, std::shared_ptr<Run>* out) {
  BlockCopier& copier = *run.copier;
  const std::int64_t count = copier.blocks() - skipped;
  std::vector<HostBuffer> buffers;
  const auto make = [&](std::int64_t bytes, HostBuffer* buffer) { return copier.MakeBuffer(bytes, buffer); };
  KVPAGE_RETURN_IF_ERROR(memory_->Take(run.shape.bytes(), count, make, &buffers));
  auto blocks = std::make_shared<Run>(memory_, run.shape.bytes(), std::move(buffers));
  const std::int64_t step = std::max<std::int64_t>(kCopyBytes / run.shape.bytes(), 1);
  for (std::int64_t begin = 0; begin < count; begin += step) {
    std::vector<char*> to;
    for (std::int64_t i = begin; i < std::min(begin + step, count); ++i) to.push_back(blocks->blocks[i].get());
    KVPAGE_RETURN_IF_ERROR(copier.Copy(skipped + begin, to));
  }
  blocks->Shorten(std::clamp<std::int64_t>(copier.End() - skipped, 0, count));
  *out = std::move(blocks);
  return {};
}

Status HostPrefixes::AddRun(const Identity& identity, const WriteRun& run, std::int64_t first_block,
                            const std::shared_ptr<Run>& blocks) {
  const auto count = static_cast<std::int64_t>(blocks->blocks.size());
  FileHeader header;
  header.identity = identity;
  header.first_block = first_block;
  header.tokens.assign(run.tokens.begin(), run.tokens.begin() + (first_block + count) * run.shape.block_tokens);
  header.checksums.assign(count, 0);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (owners_.count(identity.fingerprint) == 0) return Closed();
  const std::string name = Number(++num_runs_);
  directory_.Add(name, header.data_bytes(), header);
  blocks->used = ++uses_;
  runs_.emplace(name, blocks);
  numbers_.bytes_written += header.data_bytes();
  return {};
}

void HostPrefixes::Read(const std::string& owner, ReadRequest request) {
  ReadOrder order;
  order.request = std::move(request);
  const ReadRequest& wanted = order.request;
  const BlockShape& shape = wanted.shape;
  const auto end = static_cast<std::int64_t>(wanted.tokens.size()) / shape.block_tokens;
  std::int64_t stored = wanted.begin;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Identity identity{shape, owner, wanted.space};
    for (const StoredPart& part : directory_.Find(identity, wanted.tokens.data(), end * shape.block_tokens)) {
      const std::shared_ptr<Run>& run = runs_[part.file];
      run->used = ++uses_;
      const std::int64_t from = std::max(part.begin, wanted.begin), to = std::min(part.end, end);
      if (from >= to) continue;
      order.pieces.push_back({run, part.index + from - part.begin, to - from});
      stored = to;
    }
  }
  if (stored < end) order.problem = Problem::kGone;
  if (stored > wanted.begin) {
    const std::lock_guard<std::mutex> lock(queues_mutex_);
    order.problem = stopped_ ? Problem::kClosed : order.problem;
    try {
      if (!stopped_ && reads_ == nullptr) {
        reads_ = std::make_unique<WorkQueue<ReadOrder>>(1, kAnyNumber, [this](ReadOrder& each) { WorkOn(each); });
      }
      if (!stopped_ && reads_->Offer(order, 0)) return;
    } catch (const std::exception&) {  // cannot start a thread
      order.problem = Problem::kUnreadable;
    }
  }
  const auto done = std::move(order.request.done);
  order.pieces.clear();
  if (done) done(0, order.problem);
}

void HostPrefixes::WorkOn(ReadOrder& order) {
  const ReadRequest& request = order.request;
  const std::int64_t step = std::max<std::int64_t>(kCopyBytes / request.shape.bytes(), 1);
  std::int64_t good = 0;
  Status status;
  const auto cancelled = [&] { return request.cancelled != nullptr && request.cancelled->load(); };
  for (const ReadOrder::Piece& piece : order.pieces) {
    for (std::int64_t at = 0; at < piece.count && status.ok() && !cancelled();) {
      std::vector<const char*> from;
      const std::int64_t stop = std::min(at + step, piece.count);
      for (std::int64_t i = at; i < stop; ++i) from.push_back(piece.run->blocks[piece.begin + i].get());
      status = request.place(good, from);
      if (status.ok()) good += stop - at;
      at = stop;
    }
  }
  if (!status.ok()) {
    order.problem = Problem::kUnreadable;
    NoteError(status, &HostPrefixNumbers::failed_reads);
  } else if (cancelled()) {
    order.problem = Problem::kClosed;
  }
  if (good > 0) {
    const std::chrono::duration<double> passed = Clock::now() - order.begun;
    const std::int64_t bytes = good * request.shape.bytes();
    const double speed = static_cast<double>(bytes) / std::max(passed.count(), 1e-9);
    const std::lock_guard<std::mutex> lock(mutex_);
    numbers_.bytes_read += bytes;
    double& latest = numbers_.read_bytes_per_second;
    latest = latest == 0 ? speed : latest + kNewest * (speed - latest);
  }
  const auto done = std::move(order.request.done);
  order.pieces.clear();  // before the caller can check what is evictable
  if (done) done(good, order.problem);
}

void HostPrefixes::NoteError(const Status& status, std::int64_t HostPrefixNumbers::* count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++(numbers_.*count);
  numbers_.last_error = status.message();
}

HostPrefixNumbers HostPrefixes::Numbers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  HostPrefixNumbers numbers = numbers_;
  numbers.runs = directory_.num_files();
  numbers.bytes = directory_.bytes();
  return numbers;
}

double HostPrefixes::read_bytes_per_second() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return numbers_.read_bytes_per_second;
}

void HostPrefixes::Stop() {
  {
    // No queue is created or used after this.
    const std::lock_guard<std::mutex> lock(queues_mutex_);
    stopped_ = true;
  }
  if (writes_ != nullptr) {
    for (const WriteOrder& order : writes_->Stop()) {
      if (order.run.done) order.run.done(Closed());
    }
  }
  if (reads_ != nullptr) {
    for (const ReadOrder& order : reads_->Stop()) {
      if (order.request.done) order.request.done(0, Problem::kClosed);
    }
  }
  std::map<std::string, std::shared_ptr<Run>> gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [name, run] : runs_) directory_.Remove(name);
  gone.swap(runs_);
}

}  // namespace kvpage::store
