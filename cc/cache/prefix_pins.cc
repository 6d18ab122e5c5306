#include "cache/prefix_pins.h"

namespace kvpage {

void PrefixPins::Count(std::int32_t id, std::int32_t end, std::int32_t difference) {
  for (; id != end; id = tree_.entry(id).parent) {
    std::int32_t& pins = tree_.entry(id).pins;
    const bool before = pins > 0;
    pins += difference;
    if (tree_.entry(id).tokens > 0) num_pinned_ += static_cast<int>(pins > 0) - static_cast<int>(before);
  }
}

std::size_t PrefixPins::Add(std::int32_t space, const std::int32_t* tokens, std::int64_t count,
                            const std::vector<std::int32_t>& path, std::int64_t most, double expires,
                            std::int32_t* end_before) {
  *end_before = kNoEntry;
  std::size_t length = 0;
  for (std::int64_t pinned = num_pinned_; length < path.size(); ++length) {
    if (tree_.entry(path[length]).pins == 0 && ++pinned > most) break;
  }
  if (length == 0) return 0;
  const auto [place, added] = records_.try_emplace(Key(space, {tokens, tokens + count}), Record{kNoEntry, {}});
  Record& record = place->second;
  *end_before = record.entry;
  // A lower limit than before does not shorten existing pins.
  if (added || tree_.entry(record.entry).depth <= tree_.entry(path[length - 1]).depth) {
    Count(record.entry, kNoEntry, -1);
    record.entry = path[length - 1];
    Count(record.entry, kNoEntry, 1);
  }
  record.expires.insert(expires);
  return length;
}

std::int32_t PrefixPins::TakeFirst(std::map<Key, Record>::iterator place) {
  Record& record = place->second;
  const std::int32_t entry = record.entry;
  record.expires.erase(record.expires.begin());
  if (record.expires.empty()) {
    Count(entry, kNoEntry, -1);
    records_.erase(place);
  }
  return entry;
}

std::int32_t PrefixPins::Remove(std::int32_t space, const std::int32_t* tokens, std::int64_t count) {
  const auto place = records_.find(Key(space, {tokens, tokens + count}));
  return place == records_.end() ? kNoEntry : TakeFirst(place);
}

std::vector<std::int32_t> PrefixPins::Expire(double now) {
  std::vector<std::int32_t> ends;
  for (auto next = records_.begin(); next != records_.end();) {
    const auto place = next++;
    for (std::size_t left = place->second.expires.size(); left > 0 && *place->second.expires.begin() <= now; --left) {
      ends.push_back(TakeFirst(place));
      if (left == 1) break;  // the record has been removed
    }
  }
  return ends;
}

void PrefixPins::Retreat(std::int32_t id) {
  if (tree_.entry(id).pins == 0) return;
  for (auto& [key, record] : records_) {
    if (record.entry != id) continue;
    const std::int32_t parent = tree_.entry(id).parent;
    Count(id, parent, -1);
    record.entry = parent;
  }
}

}  // namespace kvpage
