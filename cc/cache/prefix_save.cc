#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/staging.h"
#include "cache/prefix_match.h"
#include "cache/prefix_store.h"
#include "cache/prefix_store_parts.h"

namespace kvpage::prefix {
namespace {

using Tokens = std::vector<std::int32_t>;

// Bytes copied each time the mapping mutex is held.
constexpr std::int64_t kCopyBytes = std::int64_t{8} << 20;

// Consecutive blocks of a sequence.
struct Run {
  std::string space;
  Tokens tokens;  // from the start of the sequence to the end of the last block
  std::int64_t first_block = 0;
};

// All full blocks in the index, each in one run, parents first.
std::vector<Run> AllRuns(const PrefixIndex& index, std::int64_t block_tokens) {
  struct Entry {
    std::int32_t id, parent, space;
    const std::int32_t* tokens;
    bool continued;
  };
  std::vector<Entry> entries;
  std::unordered_map<std::int32_t, std::size_t> places;
  index.ForEach(
      [&](std::int32_t space, std::int32_t id, std::int32_t parent, const std::int32_t* tokens, std::int64_t count) {
        if (count < block_tokens) return;
        if (const auto found = places.find(parent); found != places.end()) entries[found->second].continued = true;
        places.emplace(id, entries.size());
        entries.push_back({id, parent, space, tokens, false});
      });
  const std::vector<std::string> spaces = index.Namespaces();
  std::vector<Run> runs;
  std::vector<bool> in_run(entries.size());
  for (const Entry& end : entries) {
    if (end.continued) continue;
    Run run;
    run.space = spaces[end.space];
    std::vector<std::size_t> path;
    for (auto at = places.find(end.id); at != places.end(); at = places.find(entries[at->second].parent)) {
      path.push_back(at->second);
    }
    for (auto at = path.rbegin(); at != path.rend(); ++at) {
      run.tokens.insert(run.tokens.end(), entries[*at].tokens, entries[*at].tokens + block_tokens);
      if (in_run[*at]) ++run.first_block;
      in_run[*at] = true;
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

// The full blocks of the request's sequences that are in memory. Blocks that two sequences share are in the run of the
// first.
std::vector<Run> RunsOf(const PrefixIndex& index, std::int32_t space, const SaveRequest& request,
                        std::int64_t block_tokens) {
  std::vector<Run> runs;
  for (const Tokens& ids : request.ids) {
    const std::int64_t found = index.Find(space, ids.data(), static_cast<std::int64_t>(ids.size())).tokens;
    Run run{request.space, {ids.begin(), ids.begin() + found / block_tokens * block_tokens}, 0};
    for (const Run& other : runs) {
      const auto end = std::mismatch(run.tokens.begin(), run.tokens.end(), other.tokens.begin(), other.tokens.end());
      run.first_block = std::max(run.first_block, (end.first - run.tokens.begin()) / block_tokens);
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

// Runs that the store is writing, counted until all are done.
class Writes {
 public:
  void Begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++pending_;
  }
  void End(const Status& status) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (status_.ok()) status_ = status;
      --pending_;
    }
    changed_.notify_all();
  }
  // Returns the first failure. `done`: whether nothing is pending after at most `seconds`.
  Status Wait(double seconds, bool* done) {
    std::unique_lock<std::mutex> lock(mutex_);
    *done = changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return pending_ == 0; });
    return status_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::int64_t pending_ = 0;
  Status status_;
};

class Saving {
 public:
  Saving(const PoolParts& pool, store::BlockStore* store, const GoOn& go_on)
      : pool_(pool), store_(*store), go_on_(go_on), shape_(StoredShape(pool.table->geometry())) {}

  Status SaveRun(const Run& run, Saved* out) {
    const auto end = static_cast<std::int64_t>(run.tokens.size()) / shape_.block_tokens;
    const std::int64_t most = std::max<std::int64_t>(store_.options().file_bytes / shape_.bytes(), 1);
    std::int64_t begin = std::max(run.first_block, std::min(store_.StoredBlocks(shape_, run.space, run.tokens), end));
    out->tokens += (begin - run.first_block) * shape_.block_tokens;
    while (begin < end) {
      std::int64_t stop = std::min(begin + most, end);
      const std::int64_t wanted = stop;
      KVPAGE_RETURN_IF_ERROR(Piece(run, begin, &stop));
      out->tokens += (stop - begin) * shape_.block_tokens;
      out->written += (stop - begin) * shape_.block_tokens;
      if (stop < wanted) return {};  // the rest was evicted or is not written yet
      begin = stop;
    }
    return {};
  }

  Status Wait() {
    for (bool done = false; !done;) {
      KVPAGE_RETURN_IF_ERROR(writes_->Wait(kStoreWaitSeconds, &done));
      if (!done && go_on_ && !go_on_()) return Interrupted("save_prefixes");
    }
    return {};
  }

 private:
  // Passes blocks [begin, *end) to the store; fewer if the others are not in memory.
  Status Piece(const Run& run, std::int64_t begin, std::int64_t* end) {
    const std::shared_ptr<char[]> bytes = NewStaging((*end - begin) * shape_.bytes());
    const std::int64_t step = std::max<std::int64_t>(kCopyBytes / shape_.bytes(), 1);
    std::int64_t copied = begin;
    for (std::int64_t stop = begin; copied == stop && stop < *end;) {
      stop = std::min(copied + step, *end);
      KVPAGE_RETURN_IF_ERROR(CopyBlocks(pool_, "save_prefixes", run.space, run.tokens, stop,
                                        bytes.get() + (copied - begin) * shape_.bytes(), &copied));
    }
    *end = copied;
    if (copied == begin) return {};
    store::WriteRun write;
    write.shape = shape_;
    write.space = run.space;
    write.tokens.assign(run.tokens.begin(), run.tokens.begin() + copied * shape_.block_tokens);
    write.first_block = begin;
    const std::int64_t ranges = (copied - begin) * shape_.ranges;
    for (std::int64_t i = 0; i < ranges; ++i) write.sources.push_back(bytes.get() + i * shape_.block_bytes);
    write.keep = bytes;
    write.done = [writes = writes_](const Status& status) { writes->End(status); };
    writes_->Begin();
    while (!store_.WaitForRoom(ranges * shape_.block_bytes, kStoreWaitSeconds) || !store_.Write(write)) {
      Status status = store_.Check("save_prefixes");
      if (status.ok() && go_on_ && !go_on_()) status = Interrupted("save_prefixes");
      if (!status.ok()) {
        writes_->End(status);
        return status;
      }
    }
    bool done = false;
    return writes_->Wait(0, &done);
  }

  const PoolParts& pool_;
  store::BlockStore& store_;
  const GoOn& go_on_;
  const store::BlockShape shape_;
  const std::shared_ptr<Writes> writes_ = std::make_shared<Writes>();
};

}  // namespace

Status CopyBlocks(const PoolParts& pool, const char* op, const std::string& space, const Tokens& tokens,
                  std::int64_t stop, char* out, std::int64_t* copied) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  const MappingLock mapping = pool.supply->Lock();
  PrefixIndex* index = nullptr;
  KVPAGE_RETURN_IF_ERROR(OpenStoredIndex(pool, mapping, op, &index));
  const char* const window = pool.supply->arena(mapping).window();
  const PrefixMatch match = index->Find(index->Namespace(space), tokens.data(), stop * geometry.block_tokens);
  const std::int64_t found = match.tokens / geometry.block_tokens;
  for (; *copied < found; ++*copied) {
    const std::int64_t end = (*copied + 1) * geometry.block_tokens;
    if (!Written(pool, pool.table->Lock(), match.owners[*copied], end)) break;
    for (std::int64_t range = 0; range < ranges; ++range, out += geometry.block_bytes) {
      const std::int64_t block = match.blocks[*copied * ranges + range];
      std::memcpy(out, window + block * geometry.block_bytes, geometry.block_bytes);
    }
  }
  return {};
}

store::BlockShape StoredShape(const Geometry& geometry) {
  store::BlockShape shape;
  shape.layout = std::string(geometry.layout == Layout::kFused ? "fused" : "per_layer") + " " + Name(geometry.dtype) +
                 " num_layers=" + std::to_string(geometry.num_layers) +
                 " num_kv_heads=" + std::to_string(geometry.num_kv_heads) +
                 " head_dim=" + std::to_string(geometry.head_dim);
  shape.block_tokens = geometry.block_tokens;
  shape.ranges = geometry.num_ranges();
  shape.block_bytes = geometry.block_bytes;
  return shape;
}

Status Save(const PoolParts& pool, store::BlockStore* store, const SaveRequest& request, const GoOn& go_on,
            Saved* out) {
  KVPAGE_RETURN_IF_ERROR(CheckPlatform(pool, "save_prefixes"));
  KVPAGE_RETURN_IF_ERROR(store->Check("save_prefixes"));
  const std::int64_t block_tokens = pool.table->geometry().block_tokens;
  std::vector<Run> runs;
  {
    const MappingLock mapping = pool.supply->Lock();
    PrefixIndex* index = nullptr;
    KVPAGE_RETURN_IF_ERROR(OpenStoredIndex(pool, mapping, "save_prefixes", &index));
    runs = request.all ? AllRuns(*index, block_tokens)
                       : RunsOf(*index, index->Namespace(request.space), request, block_tokens);
  }
  Saving saving(pool, store, go_on);
  for (const Run& run : runs) KVPAGE_RETURN_IF_ERROR(saving.SaveRun(run, out));
  return saving.Wait();
}

}  // namespace kvpage::prefix
