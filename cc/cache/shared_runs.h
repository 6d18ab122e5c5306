// SharedRuns: the physical blocks that slots have in common. It is updated when mappings change, so that a handler that
// wants to read shared blocks once need not look at maps or take the mapping mutex.
//
// A run is the beginning of a slot's mapping, up to where other slots have mapped the same blocks at some time. It is
// exact: it is cut before a mapping changes, and a handler can ask afterwards whether this has happened. The arena
// maintains the runs. They have their own mutex, which is only held briefly and may be taken while holding any other
// lock. For programs on a device, a mirror follows each change.
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

  // Makes the mirror follow each change from now on. There must be no runs yet.
  void Follow(Mirror* mirror) { mirror_ = mirror; }

  // The caller of Set, size and Cut must hold the mapping mutex.
  // Set: other slots map the first `count` logical blocks of a slot too. Block i is map[i * stride].
  void Set(std::int64_t slot, const std::int32_t* map, std::int64_t stride, std::int64_t count);
  // Length of a slot's run.
  std::int64_t size(std::int64_t slot) const { return static_cast<std::int64_t>(runs_[slot].blocks.size()); }
  // Called before the slot's mappings change from logical block `blocks` on. If it fails they must not change: programs
  // on the device might read memory that is not the slot's.
  Status Cut(std::int64_t slot, std::int64_t blocks);
  // Logical block `logical` moves to another physical block with the same contents, in every slot that maps `from`
  // there.
  void Replace(std::int64_t logical, std::int32_t from, std::int32_t to);

  // Finds what the sequences share; their slots must be pinned. Returns a time to pass to Changed.
  std::uint64_t Find(const std::vector<Sequence>& sequences, SharedPrefixes* out) const;
  // Whether a run of one of the sequences has been cut since then.
  bool Changed(const std::vector<Sequence>& sequences, std::uint64_t since) const;
  // Calls read(prefixes), which may read what sequences share through any of their slots. If a concurrent program has
  // replaced blocks of one of the slots, calls it again without prefixes. Returns the status of the last call.
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
  std::uint64_t cuts_ = 0;             // total number of cuts
  std::atomic<std::int64_t> size_{0};  // number of runs with blocks
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_SHARED_RUNS_H_
