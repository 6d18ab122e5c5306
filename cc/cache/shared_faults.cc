#include "cache/shared_faults.h"

#include <algorithm>
#include <utility>

namespace kvpage {

std::size_t SharedFaults::Join(std::string note) {
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.emplace_back();
  entries_.back().note = std::move(note);
  return entries_.size() - 1;
}

void SharedFaults::Add(std::size_t pool, const Status& fault, bool current) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry& entry = entries_[pool];
  Status& kept = current ? entry.fault : entry.late;
  // Only the first fault of all pools counts: later ones may follow from it, and the new generation clears them anyway.
  const bool failed = std::any_of(entries_.begin(), entries_.end(), [](const Entry& each) { return !each.fault.ok(); });
  if (!kept.ok() || (current && failed)) return;
  kept =
      fault
          .WithMessage(fault.message() + entry.note +
                       ". Its results, and those of later ops here, are NaN: start a new generation with pool.cache()")
          .WithReason(Reason::kDeviceFault);
  entry.told &= !current;
  any_ = true;
}

void SharedFaults::StartGeneration(std::size_t pool) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry& entry = entries_[pool];
  if (!entry.fault.ok() && !entry.told && entry.late.ok()) entry.late = entry.fault;
  entry.fault = Status();
  entry.told = false;
  any_ = std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& each) { return !each.fault.ok() || !each.late.ok(); });
}

Status SharedFaults::Get() {
  if (!in_calls_ || !any_) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) {
    if (entry.fault.ok()) continue;
    entry.told = true;
    return entry.fault;
  }
  return {};
}

Status SharedFaults::Untold() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Entry& entry : entries_) {
    if (!entry.fault.ok() && !entry.told) return entry.fault;
    if (!entry.late.ok()) return entry.late;
  }
  return {};
}

Status SharedFaults::Take() {
  if (!any_) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  Status first, late;
  for (Entry& entry : entries_) {
    if (!entry.fault.ok() && first.ok()) first = entry.fault;
    if (!entry.late.ok() && late.ok()) late = entry.late;
    entry.told |= !entry.fault.ok();
    entry.late = Status();
  }
  any_ = !first.ok();
  return first.ok() ? late : first;
}

}  // namespace kvpage
