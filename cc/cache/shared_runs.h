// SharedRuns: which physical blocks the slots have in common, kept when mappings change, so that a handler that reads
// them together need not look at maps or take the mapping mutex.
//
// A run is what a slot maps at its beginning, as far as other slots have ever mapped it too. It is exact: it is cut
// before a mapping changes, and a handler can ask afterwards whether that has happened. The arena keeps the runs; they
// have a mutex that is held for moments, and may be asked under any other lock. Where programs run on a device, a
// mirror follows each change.
#ifndef KVPAGE_CACHE_SHARED_RUNS_H_
#define KVPAGE_CACHE_SHARED_RUNS_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/kv_view.h"
#include "base/shared_prefixes.h"
#include "base/status.h"
#include "cache/mirror.h"

namespace kvpage {

class SharedRuns {
 public:
  SharedRuns(std::int64_t num_slots, std::int64_t block_tokens) : block_tokens_(block_tokens), runs_(num_slots) {}

  // Tells the mirror of each change from now on. There are no runs yet.
  void Follow(Mirror* mirror) { mirror_ = mirror; }

  // Both are called under the mapping mutex.
  // Other slots map the first `count` logical blocks of a slot too. Block i is map[i * stride].
  void Set(std::int64_t slot, const std::int32_t* map, std::int64_t stride, std::int64_t count);
  // From logical block `blocks` on, the slot's mappings are about to change. They must not when it fails: programs on
  // the device might read other memory than the slot's.
  Status Cut(std::int64_t slot, std::int64_t blocks);
  // Logical block `logical` has another physical block with the same contents in every slot that maps `from` there.
  void Replace(std::int64_t logical, std::int32_t from, std::int32_t to);

  // What the sequences, whose slots are pinned, share. Returns the time to ask Changed about.
  std::uint64_t Find(const std::vector<Sequence>& sequences, SharedPrefixes* out) const;
  // Whether a run of one of them has been cut since.
  bool Changed(const std::vector<Sequence>& sequences, std::uint64_t since) const;
  // Calls read(prefixes), which may read what sequences share through any of their slots. When a program that ran
  // beside it has exchanged blocks of one of the slots, calls it again without prefixes. Returns the status of the last
  // call.
  template <class Read>
  Status ReadTogether(const std::vector<Sequence>& sequences, const Read& read) const {
    SharedPrefixes prefixes;
    const std::uint64_t found_at = Find(sequences, &prefixes);
    Status status = read(prefixes);
    if (!status.ok() || prefixes.empty() || !Changed(sequences, found_at)) return status;
    prefixes.Clear();
    return read(prefixes);
  }

 private:
  struct Run {
    std::vector<std::int32_t> blocks;
    std::uint64_t cut_at = 0;
  };

  const std::int64_t block_tokens_;
  Mirror* mirror_ = nullptr;
  mutable std::mutex mutex_;
  std::vector<Run> runs_;              // [slots]
  std::uint64_t cuts_ = 0;             // of all runs so far
  std::atomic<std::int64_t> size_{0};  // runs with blocks
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SHARED_RUNS_H_
