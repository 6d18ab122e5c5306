#include "vmm/mappings.h"

#include <algorithm>

#include "vmm/limits.h"

namespace kvpage {
namespace {

// This fraction (one part in this many) of the limit is left to the process: a few mappings for each thread and each
// compiled program.
constexpr std::int64_t kReservePart = 8;
// This fraction of the limit may be promised without reading the process's mappings again: half the reserve. If the
// process maps a lot meanwhile, pools take at most that half.
constexpr std::int64_t kUnreadPart = 2 * kReservePart;
// Above every limit, and small enough to be doubled.
constexpr std::int64_t kMany = std::int64_t{1} << 60;

std::int64_t Allowed(const MapAccount::Limits& limits) {
  return std::max<std::int64_t>(limits.total - limits.total / kReservePart - limits.others, 0);
}

}  // namespace

std::int64_t WorstMappings(std::int64_t blocks, std::int64_t ranges, std::int64_t blocks_per_range) {
  std::int64_t room = 0;
  if (__builtin_mul_overflow(ranges, blocks_per_range, &room)) room = kMany;
  const std::int64_t mapped = std::min({blocks, room, kMany});
  return mapped + std::min(mapped, ranges) + 1;
}

std::int64_t MostBlocks(std::int64_t mappings, std::int64_t ranges) {
  const std::int64_t rest = mappings - 1;
  return std::max<std::int64_t>({rest / 2, rest - ranges, 0});
}

std::int64_t MapAccount::Left() const { return std::max<std::int64_t>(Allowed(read_()) - promised_, 0); }

std::int64_t MapAccount::Share() const {
  const Limits limits = read_();
  const std::int64_t left = Allowed(limits) - promised_;
  // A fixed part of the limit, halved until the remaining mappings exceed it by a quarter: this gives the same block
  // size in most processes. Slightly more than half, because capacities are powers of two and the default limit is just
  // below one.
  std::int64_t share = limits.total / 16 * 9;
  while (share > 1 && share + share / 4 > left) share /= 2;
  return std::max<std::int64_t>(share, 1);
}

std::string MapAccount::Describe() const {
  const Limits limits = read_();
  const auto number = [](std::int64_t value) { return std::to_string(value); };
  return "vm.max_map_count allows this process " + number(limits.total) + " mappings, " + number(promised_) +
         " are reserved for its pools, " + number(limits.others) + " are used by the rest of the process and " +
         number(limits.total / kReservePart) + " are kept for threads and compiled programs";
}

MapAccount& ProcessMapAccount() {
  // Never destroyed: pools may outlive static objects.
  static auto* const account =
      new MapAccount([] { return MapAccount::Limits{MaxMapCount(), CurrentMapCounts().others}; });
  return *account;
}

bool MapAccount::Promise(std::int64_t more, Reading reading) {
  if (reading == Reading::kRecent) {
    const std::int64_t unread = unread_.fetch_add(more) + more;
    if (unread <= most_unread_ && Add(more, allowed_)) return true;
  }
  const Limits limits = read_();
  allowed_ = Allowed(limits);
  most_unread_ = limits.total / kUnreadPart;
  unread_ = 0;
  return Add(more, allowed_);
}

bool MapAccount::Add(std::int64_t more, std::int64_t allowed) {
  std::int64_t promised = promised_;
  do {
    if (promised + more > allowed) return false;
  } while (!promised_.compare_exchange_weak(promised, promised + more));
  return true;
}

bool MapPromise::Change(std::int64_t mappings, MapAccount::Reading reading) {
  if (account_ == nullptr) return true;
  const std::int64_t more = mappings - mappings_;
  if (more <= 0) {
    account_->promised_ += more;
  } else if (!account_->Promise(more, reading)) {
    return false;
  }
  mappings_ = mappings;
  return true;
}

}  // namespace kvpage
