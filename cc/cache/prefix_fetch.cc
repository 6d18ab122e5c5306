#include "cache/prefix_fetch.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

#include "cache/messages.h"
#include "cache/prefix_store.h"
#include "cache/prefix_store_parts.h"

namespace kvpage::prefix {
namespace {

using Clock = std::chrono::steady_clock;

// One in this many requests that are refused because of the read speed is read anyway, without making the caller wait,
// so that the speed is measured again.
constexpr std::int64_t kRefusalsBetweenReads = 16;

std::string Text(const char* format, double value) {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

}  // namespace

bool FetchTicket::Wait(double seconds) const {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return ready_; });
}

std::int64_t FetchTicket::tokens() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return tokens_;
}

std::string FetchTicket::error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void FetchTicket::Finish(std::int64_t tokens, std::string error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready_ = true;
    tokens_ = tokens;
    error_ = std::move(error);
  }
  changed_.notify_all();
}

struct Fetcher::Order {
  std::shared_ptr<FetchTicket> ticket;
  std::string space;
  std::vector<std::int32_t> tokens;  // from the start of the sequence to the end of the last block to read
  std::int64_t begin = 0;            // first block to read
  std::int64_t asked = 0;            // number of blocks stored from there on
  std::vector<std::int32_t> blocks;  // claimed
  Clock::time_point begun = Clock::now();
  std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);
};

Status Fetcher::Start(const PoolParts& pool, const FetchRequest& request, std::shared_ptr<FetchTicket>* out) {
  KVPAGE_RETURN_IF_ERROR(store_.Check("prefetch"));
  const store::BlockShape shape = StoredShape(pool.table->geometry());
  const auto length = static_cast<std::int64_t>(request.ids.size());
  const std::int64_t stored = store_.Find(shape, request.space, request.ids.data(), length) / shape.block_tokens;
  const auto order = std::make_shared<Order>();
  store::ReadRequest read;
  {
    Supply& supply = *pool.supply;
    const MappingLock mapping = supply.Lock();
    PrefixIndex* index = nullptr;
    KVPAGE_RETURN_IF_ERROR(OpenStoredIndex(pool, mapping, "prefetch", &index));
    const PrefixMatch match = index->Find(index->Namespace(request.space), request.ids.data(), length);
    order->begin = match.tokens / shape.block_tokens;
    order->asked = stored - order->begin;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return messages::Closed("prefetch", pool.table->id());
    *out = order->asked > 0 ? Joined(request.space, request.ids.data(), stored * shape.block_tokens) : nullptr;
    if (*out != nullptr) return {};
    *out = order->ticket = std::make_shared<FetchTicket>();
    std::string why;
    if (order->asked <= 0 || !Worthwhile(request.prefill_rate, shape, order->asked, &why)) {
      if (order->asked > 0) numbers_.missed["slower"] += order->asked * shape.block_tokens;
      order->ticket->Finish(0, why);
      if (order->asked <= 0 || ++refusals_ % kRefusalsBetweenReads != 0) return {};
      order->ticket = std::make_shared<FetchTicket>();
    }
    Arena& arena = supply.arena(mapping);
    // Held while room is made.
    arena.Hold(match.blocks);
    std::int64_t short_of = order->asked * shape.ranges - arena.pool().num_free();
    Status status;
    if (short_of > 0) status = supply.Apply(mapping, supply.PlanReclaim(mapping, short_of));
    short_of = order->asked * shape.ranges - arena.pool().num_free();
    if (status.ok() && short_of > 0) supply.Evict(mapping, short_of, /*partial=*/true);
    arena.Drop(match.blocks);
    KVPAGE_RETURN_IF_ERROR(status);
    const std::int64_t most = std::min(order->asked, arena.pool().num_free() / shape.ranges);
    status = arena.ClaimToFill(most * shape.ranges, &order->blocks);
    if (!status.ok() && status.code() != Code::kResourceExhausted) return status;
    const auto count = static_cast<std::int64_t>(order->blocks.size()) / shape.ranges;
    numbers_.missed["no room"] += (order->asked - count) * shape.block_tokens;
    if (count == 0) {
      order->ticket->Finish(0, "no free blocks");
      return {};
    }
    ++numbers_.requests;
    order->space = request.space;
    order->tokens.assign(request.ids.begin(), request.ids.begin() + (order->begin + count) * shape.block_tokens);
    SetDestinations(pool.table->geometry(), arena.window(), *order, &read);
    active_.push_back(order);
  }
  read.shape = shape;
  read.space = order->space;
  read.tokens = order->tokens;
  read.begin = order->begin;
  read.cancelled = order->cancelled;
  read.done = [self = shared_from_this(), order](std::int64_t good, store::Problem problem) {
    self->Finish(*order, good, problem);
  };
  store_.Fetch(std::move(read));
  return {};
}

void Fetcher::SetDestinations(const Geometry& geometry, char* window, const Order& order,
                              store::ReadRequest* read) const {
  const std::int64_t ranges = geometry.num_ranges(), bytes = geometry.block_bytes;
  std::vector<char*> to;
  for (const std::int32_t block : order.blocks) to.push_back(window + block * bytes);
  if (mover_ == nullptr) {
    read->destinations = std::move(to);
    return;
  }
  read->place = [mover = mover_, ranges, bytes, to = std::move(to)](std::int64_t begin,
                                                                    const std::vector<const char*>& from) {
    std::vector<BlockMover::ToBlock> copies;
    for (std::size_t i = 0; i < from.size(); ++i) {
      for (std::int64_t range = 0; range < ranges; ++range) {
        const std::int64_t at = (begin + static_cast<std::int64_t>(i)) * ranges + range;
        copies.push_back({to[at], from[i] + range * bytes});
      }
    }
    return mover->Copy(copies, bytes);
  };
}

bool Fetcher::Worthwhile(double prefill_rate, const store::BlockShape& shape, std::int64_t blocks,
                         std::string* why) const {
  const double reading = cost_.Most(blocks * shape.bytes());
  if (prefill_rate <= 0 || reading <= 0) return true;
  const auto tokens = static_cast<double>(blocks * shape.block_tokens);
  const double computing = tokens / prefill_rate;
  if (reading < computing) return true;
  *why = "reading " + Text("%.0f", tokens) + " tokens may take " + Text("%.3g", reading) +
         " s, by the latest reads, computing them " + Text("%.3g", computing) + " s";
  return false;
}

std::shared_ptr<FetchTicket> Fetcher::Joined(const std::string& space, const std::int32_t* ids,
                                             std::int64_t tokens) const {
  for (const std::shared_ptr<Order>& order : active_) {
    if (order->space != space || static_cast<std::int64_t>(order->tokens.size()) < tokens) continue;
    if (std::equal(ids, ids + tokens, order->tokens.begin())) return order->ticket;
  }
  return nullptr;
}

void Fetcher::Finish(const Order& order, std::int64_t good, store::Problem problem) {
  std::int64_t added = 0, block_tokens = 0, bytes = 0;
  std::string why = problem == store::Problem::kNone ? "" : Name(problem);
  access_->With([&](const PoolParts& pool) {
    block_tokens = pool.table->geometry().block_tokens;
    const std::int64_t ranges = pool.table->geometry().num_ranges();
    bytes = ranges * pool.table->geometry().block_bytes;
    const MappingLock mapping = pool.supply->Lock();
    Arena& arena = pool.supply->arena(mapping);
    pool.supply->SyncIndex(mapping);
    PrefixIndex& index = pool.supply->OpenIndex(mapping);
    const std::int32_t space = index.Namespace(order.space);
    const auto end = static_cast<std::int64_t>(order.tokens.size());
    const std::int64_t known = index.Find(space, order.tokens.data(), end).tokens / block_tokens;
    if (known < order.begin) why = "evicted";
    // Meanwhile another request may have computed some of the tokens.
    if (known >= order.begin && known < order.begin + good) {
      added = order.begin + good - known;
      const auto first = order.blocks.begin() + (known - order.begin) * ranges;
      index.Add(space, order.tokens.data(), known, added, &*first, /*fetched=*/true);
      arena.SetCached({first, first + added * ranges});
    }
    arena.DropFilled(order.blocks);
  });
  const auto count = static_cast<std::int64_t>(order.tokens.size()) / std::max<std::int64_t>(block_tokens, 1);
  std::string error;
  if (order.cancelled->load() || block_tokens == 0) {
    error = "the pool was closed";
  } else if (why == "evicted") {
    error = "the tokens before those that were read have been evicted meanwhile";
  } else if (!why.empty()) {
    error = std::to_string(good * block_tokens) + " tokens of " + std::to_string((count - order.begin) * block_tokens) +
            " were read: " + store_.Explain(problem);
  } else if (count - order.begin < order.asked) {
    error = "free blocks for " + std::to_string((count - order.begin) * block_tokens) + " tokens of " +
            std::to_string(order.asked * block_tokens) + " only";
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const double seconds = std::chrono::duration<double>(Clock::now() - order.begun).count();
    numbers_.tokens += added * block_tokens;
    numbers_.bytes += added * bytes;
    numbers_.seconds += seconds;
    numbers_.longest_seconds = std::max(numbers_.longest_seconds, seconds);
    latencies_.Add(seconds);
    if (problem == store::Problem::kNone) cost_.Add(good * bytes, seconds);
    if (!why.empty()) numbers_.missed[why] += (count - order.begin - (why == "evicted" ? 0 : good)) * block_tokens;
    active_.remove_if([&](const std::shared_ptr<Order>& each) { return each.get() == &order; });
  }
  order.ticket->Finish(added * block_tokens, std::move(error));
  ended_.notify_all();
}

Status Fetcher::Close(const GoOn& go_on) {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  for (const std::shared_ptr<Order>& order : active_) order->cancelled->store(true);
  const std::chrono::duration<double> slice(kStoreWaitSeconds);
  while (!ended_.wait_for(lock, slice, [&] { return active_.empty(); })) {
    lock.unlock();
    if (go_on && !go_on()) return Interrupted("close");
    lock.lock();
  }
  return {};
}

FetchNumbers Fetcher::numbers() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  FetchNumbers numbers = numbers_;
  numbers.latencies = latencies_.numbers();
  for (auto at = numbers.missed.begin(); at != numbers.missed.end();) {
    at = at->second == 0 ? numbers.missed.erase(at) : std::next(at);
  }
  return numbers;
}

}  // namespace kvpage::prefix
