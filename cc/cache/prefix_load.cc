#include <algorithm>
#include <memory>

#include "cache/prefix_store.h"
#include "cache/prefix_store_parts.h"

namespace kvpage::prefix {
namespace {

class Loading {
 public:
  Loading(const PoolParts& pool, store::BlockStore* store, const GoOn& go_on, Loaded* out)
      : pool_(pool), store_(*store), go_on_(go_on), shape_(StoredShape(pool.table->geometry())), out_(*out) {}

  Status File(const store::StoredRun& run) {
    std::int64_t begin = 0;
    {
      const MappingLock mapping = pool_.supply->Lock();
      KVPAGE_RETURN_IF_ERROR(Known(mapping, run, &begin));
    }
    if (begin < run.first_block) {
      lost_.push_back(&run);
      return {};
    }
    begin = std::min(begin, run.end_block);
    out_.present += Count(begin - run.first_block);
    const std::int64_t most = std::max<std::int64_t>(store_.options().file_bytes / shape_.bytes(), 1);
    while (begin < run.end_block) {
      const std::int64_t stop = std::min(begin + most, run.end_block);
      std::vector<std::int32_t> blocks;
      KVPAGE_RETURN_IF_ERROR(Claim(stop - begin, &blocks));
      const std::int64_t count = static_cast<std::int64_t>(blocks.size()) / shape_.ranges;
      std::int64_t end = begin;
      if (count > 0) KVPAGE_RETURN_IF_ERROR(Fill(run, begin, blocks, &end));
      if (end < begin + count) {
        lost_.push_back(&run);
        return {};
      }
      if (end < stop) {
        out_.no_room += Count(run.end_block - end);
        return {};
      }
      begin = stop;
    }
    return {};
  }

  // Counts what is still missing; another file may also have had it.
  Status CountLost() {
    const MappingLock mapping = pool_.supply->Lock();
    for (const store::StoredRun* const run : lost_) {
      std::int64_t known = 0;
      KVPAGE_RETURN_IF_ERROR(Known(mapping, *run, &known));
      out_.lost += Count(run->end_block - std::clamp(known, run->first_block, run->end_block));
    }
    return {};
  }

 private:
  std::int64_t Count(std::int64_t blocks) const { return blocks * shape_.block_tokens; }

  // Finds how many full blocks of a run's sequence are in memory.
  Status Known(const MappingLock& mapping, const store::StoredRun& run, std::int64_t* blocks) {
    PrefixIndex* index = nullptr;
    KVPAGE_RETURN_IF_ERROR(OpenStoredIndex(pool_, mapping, "load_prefixes", &index));
    const auto tokens = static_cast<std::int64_t>(run.tokens.size());
    *blocks = index->Find(index->Namespace(run.space), run.tokens.data(), tokens).tokens / shape_.block_tokens;
    return {};
  }

  // Claims blocks for `count` logical blocks, or for as many as are free.
  Status Claim(std::int64_t count, std::vector<std::int32_t>* blocks) {
    Supply& supply = *pool_.supply;
    const MappingLock mapping = supply.Lock();
    KVPAGE_RETURN_IF_ERROR(Enter(pool_, pool_.table->Lock(), "load_prefixes"));
    Arena& arena = supply.arena(mapping);
    const std::int64_t short_of = count * shape_.ranges - arena.pool().num_free();
    if (short_of > 0) KVPAGE_RETURN_IF_ERROR(supply.Apply(mapping, supply.PlanReclaim(mapping, short_of)));
    const std::int64_t most = std::min(count, arena.pool().num_free() / shape_.ranges);
    Status status = arena.ClaimToFill(most * shape_.ranges, blocks);
    if (!status.ok() && status.code() != Code::kResourceExhausted) return status;
    window_ = arena.window();
    return {};
  }

  // Reads into claimed blocks and adds them to the index. `end`: end of what is in memory afterwards.
  Status Fill(const store::StoredRun& run, std::int64_t begin, const std::vector<std::int32_t>& blocks,
              std::int64_t* end) {
    const std::int64_t count = static_cast<std::int64_t>(blocks.size()) / shape_.ranges;
    store::ReadRequest request;
    request.shape = shape_;
    request.space = run.space;
    request.tokens.assign(run.tokens.begin(), run.tokens.begin() + Count(begin + count));
    request.begin = begin;
    for (const std::int32_t block : blocks) request.destinations.push_back(window_ + block * shape_.block_bytes);
    const std::shared_ptr<store::ReadTicket> ticket = store_.Read(std::move(request));
    bool interrupted = false;
    // The reader owns the blocks until the ticket is ready, even if the caller should stop waiting.
    while (!ticket->Wait(kStoreWaitSeconds)) interrupted = interrupted || (go_on_ && !go_on_());
    const std::int64_t good = ticket->blocks();

    const MappingLock mapping = pool_.supply->Lock();
    Arena& arena = pool_.supply->arena(mapping);
    std::int64_t known = 0;
    const Status status = Known(mapping, run, &known);
    // Meanwhile another request may have computed the same tokens, or the blocks before may have been evicted.
    if (status.ok() && known >= begin && known < begin + good) {
      const std::int64_t added = begin + good - known;
      const auto first = blocks.begin() + (known - begin) * shape_.ranges;
      PrefixIndex& index = pool_.supply->OpenIndex(mapping);
      index.Add(index.Namespace(run.space), run.tokens.data(), known, added, &*first);
      arena.SetCached({first, first + added * shape_.ranges});
      out_.tokens += Count(added);
      *end = begin + good;
    } else {
      *end = std::clamp(known, begin, begin + count);
      out_.present += Count(*end - begin);
    }
    arena.DropFilled(blocks);
    KVPAGE_RETURN_IF_ERROR(status);
    return interrupted ? Interrupted("load_prefixes") : store_.Check("load_prefixes");
  }

  const PoolParts& pool_;
  store::BlockStore& store_;
  const GoOn& go_on_;
  const store::BlockShape shape_;
  Loaded& out_;
  char* window_ = nullptr;
  std::vector<const store::StoredRun*> lost_;
};

}  // namespace

Status Load(const PoolParts& pool, store::BlockStore* store, const GoOn& go_on, Loaded* out) {
  KVPAGE_RETURN_IF_ERROR(CheckPlatform(pool, "load_prefixes"));
  KVPAGE_RETURN_IF_ERROR(store->Refresh());
  Loading loading(pool, store, go_on, out);
  const std::vector<store::StoredRun> runs = store->Runs(StoredShape(pool.table->geometry()));
  for (const store::StoredRun& run : runs) KVPAGE_RETURN_IF_ERROR(loading.File(run));
  return loading.CountLost();
}

}  // namespace kvpage::prefix
