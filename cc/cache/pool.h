// Pool: the state machine of a KV cache. The host acquires, extends and releases slots; programs (through the FFI
// handlers) map, write, read and advance them. Independent of JAX, Python and the platform.
//
// This is a facade: it owns the parts (slot_table.h, supply.h, mirror.h) and forwards to functions that are documented
// in their own files. All calls are thread-safe. On CPU, programs call the pool as they run. On a device, kernels check
// a copy of the table (mirror.h): the pool publishes each decision before it returns, and every host call first
// collects what programs have done.
#ifndef KVPAGE_CACHE_POOL_H_
#define KVPAGE_CACHE_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/kv_view.h"
#include "base/status.h"
#include "cache/capacity.h"
#include "cache/dropping.h"
#include "cache/edit_ops.h"
#include "cache/generations.h"
#include "cache/handover.h"
#include "cache/host_ops.h"
#include "cache/inspect.h"
#include "cache/joint_maps.h"
#include "cache/map_ops.h"
#include "cache/parts.h"
#include "cache/prefix.h"
#include "cache/prefix_ops.h"
#include "cache/prefix_store.h"
#include "cache/prefix_tier.h"
#include "cache/program_ops.h"
#include "cache/relocation.h"
#include "cache/reuse.h"
#include "cache/sharing.h"
#include "cache/swapping.h"
#include "cache/views.h"

namespace kvpage {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  using Generation = kvpage::Generation;

  // `account`: where the pool's memory mappings are accounted; may be null. `mirror`: for programs that run on a
  // device.
  static Status Make(const Geometry& geometry, std::int64_t capacity_bytes, const PoolOptions& options,
                     std::unique_ptr<Vmm> vmm, MapAccount* account, std::shared_ptr<Pool>* out,
                     std::unique_ptr<Mirror> mirror = nullptr);
  // Waits for programs that use the pool's memory. If they do not end, the memory stays mapped.
  ~Pool();

  const Geometry& geometry() const { return table_.geometry(); }
  std::int32_t id() const { return table_.id(); }
  void set_id(std::int32_t id) { table_.set_id(id); }
  KVView View() const { return geometry().View(supply_.base()); }
  // Shows which slots begin with the same blocks.
  const SharedRuns& shared_runs() const { return supply_.shared_runs(); }

  // Returns an error in a forked child. Takes no lock, because one may have been held when the process was forked, so
  // check this before any other call.
  Status CheckProcess(const char* op) const;
  static Status OtherProcess(const char* op, std::int32_t id);

  // ---- host: host_ops.h, capacity.h, generations.h ----
  Claim Acquire(const std::vector<std::int64_t>& tokens) { return host_ops::Acquire(parts_, tokens); }
  Claim CanAcquire(const std::vector<std::int64_t>& tokens) { return host_ops::CanAcquire(parts_, tokens); }
  Claim Extend(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
    return host_ops::Extend(parts_, slots, tokens);
  }
  Claim Fork(const char* verb, const std::vector<ForkRequest>& requests, const std::vector<std::int32_t>& released) {
    return sharing::Fork(parts_, verb, requests, released);
  }
  // If the pool has a store, the claim also says what is stored.
  Claim AcquirePrefix(const std::vector<prefix::Request>& requests, const prefix::Options& options);
  Status FindPrefix(const std::string& space, const prefix::TokenIds& ids, bool whole, std::int64_t* tokens) {
    return prefix::Find(parts_, space, ids, whole, tokens);
  }
  Status Pin(const std::string& space, const prefix::TokenIds& ids, double share, double seconds,
             std::int64_t* tokens) {
    return prefix::Pin(parts_, space, ids, share, seconds, tokens);
  }
  Status Unpin(const std::string& space, const prefix::TokenIds& ids) { return prefix::Unpin(parts_, space, ids); }
  Status Hint(const std::string& space, const prefix::TokenIds& ids, PrefixHint hint) {
    return prefix::Hint(parts_, space, ids, hint);
  }
  Status Evict(std::int64_t blocks, std::int64_t* freed) { return prefix::Evict(parts_, blocks, freed); }
  Status PrefixEvents(prefix::EventList* out) { return prefix::Events(parts_, out); }
  // ---- the store below the pool: prefix_tier.h ----
  // Call this before anything else happens to the pool, at most once. The store must be of the kind that the platform
  // needs: see PrefixStore::copies.
  Status AttachStore(std::shared_ptr<store::PrefixStore> store, double write_ahead);
  // These do not wait. Without a store, nothing is stored.
  Status StoredPrefix(const std::string& space, const prefix::TokenIds& ids, std::int64_t* tokens);
  Status Prefetch(const prefix::FetchRequest& request, std::shared_ptr<prefix::FetchTicket>* out);
  prefix::TierNumbers StoreNumbers() { return tier_ != nullptr ? tier_->Numbers() : prefix::TierNumbers(); }
  // These wait for the store without holding a lock.
  Status SavePrefixes(store::BlockStore* store, const prefix::SaveRequest& request, const GoOn& go_on,
                      prefix::Saved* out) {
    return prefix::Save(parts_, store, request, go_on, out);
  }
  Status LoadPrefixes(store::BlockStore* store, const GoOn& go_on, prefix::Loaded* out) {
    return prefix::Load(parts_, store, go_on, out);
  }
  Claim Truncate(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens) {
    return sharing::Truncate(parts_, slots, tokens);
  }
  Status SharesBehind(std::int32_t slot, std::int64_t tokens, bool* out) {
    return sharing::SharesBehind(parts_, slot, tokens, out);
  }
  Status DropBefore(const std::vector<std::int32_t>& slots, const std::vector<std::int64_t>& tokens,
                    std::vector<std::int64_t>* dropped, const CacheRef& cache = {}) {
    return dropping::Start(parts_, slots, tokens, cache, dropped);
  }
  Status Drops(std::int32_t slot, std::int64_t tokens, bool* out) { return dropping::Drops(parts_, slot, tokens, out); }
  Status StartReuse(std::vector<SegmentCopy>* copies, std::vector<reuse::Mark>* before) {
    return reuse::Start(parts_, copies, before);
  }
  void UndoReuse(const std::vector<reuse::Mark>& before) { reuse::Undo(parts_, before); }
  Status SwapOut(std::int32_t slot, const std::shared_ptr<store::SwapStore>& store, SwapPtr* out) {
    return swapping::Out(parts_, slot, store, weak_from_this(), out);
  }
  Claim Prefetch(const SwapPtr& swap) { return swapping::Prefetch(parts_, swap); }
  Claim SwapIn(const SwapPtr& swap, bool recover = false) { return swapping::In(parts_, swap, recover); }
  // With a mirror: continues swapping sequences whose release programs have run.
  void ContinueSwaps() { swapping::Poll(parts_); }
  void UndoSwapIn(const SwapPtr& swap, std::int32_t slot) { swapping::UndoIn(parts_, swap, slot); }
  void DropSwapped(const SwapPtr& swap) { swapping::Drop(parts_, swap); }
  Claim AcquireHandover(const std::vector<std::int64_t>& tokens) { return handover::Acquire(parts_, tokens); }
  Status ExportBlocks(std::int32_t slot, const std::string& fingerprint, const GoOn& go_on,
                      handover::HandoverPtr* out) {
    return handover::Export(parts_, slot, fingerprint, go_on, out);
  }
  Claim ImportBlocks(const handover::Handover& handover, const std::string& fingerprint) {
    return handover::Import(parts_, handover, fingerprint);
  }
  void UndoImport(std::int32_t slot) { handover::UndoImport(parts_, slot); }
  Status StartEdits(const char* verb, const std::vector<SlotEdit>& edits) {
    return host_ops::StartEdits(parts_, verb, edits);
  }
  void UndoEdits(const std::vector<SlotEdit>& edits) { host_ops::UndoEdits(parts_, edits); }
  Status Retract(std::int32_t slot, std::int64_t reserved, std::int64_t committed) {
    return host_ops::Retract(parts_, slot, reserved, committed);
  }
  Status Commit(std::int32_t slot, const std::vector<std::int32_t>& token_ids) {
    return host_ops::Commit(parts_, slot, token_ids);
  }
  std::vector<std::int32_t> Committed(std::int32_t slot) { return host_ops::Committed(parts_, slot); }
  Status Trim(std::int64_t* freed_blocks) { return capacity::Trim(parts_, freed_blocks); }
  Claim Resize(std::int64_t capacity_bytes) { return capacity::Resize(parts_, capacity_bytes); }
  Status Relocate(const relocation::Options& options, relocation::Report* report) {
    return relocation::Relocate(parts_, options, report);
  }
  // `go_on`: see patience.h.
  Status NewGeneration(Generation* out, const GoOn& go_on = {}) { return generations::Start(parts_, out, go_on); }
  // Number of swapped sequences that are being written, whose blocks will become free.
  std::int64_t SwapWrites() { return table_.swap_writes(table_.Lock()); }
  bool WaitForDrain(double seconds) { return generations::WaitForDrain(parts_, seconds); }
  // The memory is freed with the last reference to the pool.
  Status Close(const GoOn& go_on);
  void Close() { static_cast<void>(Close(GoOn())); }
  // Returns the pending device fault, if any, as the status with which the program would have failed on a single CPU
  // device. Mutating calls return it too. Read-only calls and NewGeneration, which recovers from the fault, do not.
  Status TakeFault();
  // Returns a shared fault that no call has reported yet.
  Status UntoldFault();

  // ---- joined pools: joint_maps.h ----
  // Makes programs map memory identically in all of these pools from now on. Call it before any program runs, at most
  // once per pool. Either all pools run programs on CPU, or each on a different device.
  static Status Join(const std::vector<std::shared_ptr<Pool>>& pools, std::shared_ptr<JointMaps>* out);
  // Makes ops record faults instead of failing their programs: see shared_faults.h. `note` is appended to this pool's
  // messages. Call it before any program runs, at most once, and not with a mirror.
  void ShareFaults(std::shared_ptr<SharedFaults> faults, std::string note);
  // Records that an op with a cache of this generation has failed. Returns false if its program must fail: without
  // shared faults, or after the pool was closed (which it is on all devices then).
  bool KeepFault(std::int32_t generation, const Status& fault);

  // ---- with a mirror ----
  // See Mirror::TakeWarning; empty without a mirror.
  std::string TakeWarning() { return mirror_ != nullptr ? mirror_->TakeWarning() : ""; }
  bool mirrored() const { return mirror_ != nullptr; }
  int device() const { return mirror_ != nullptr ? mirror_->device() : -1; }
  // Makes the pool findable by programs under its id.
  Status OpenMirror();
  // See parts.h. Does nothing in a forked child, if the pool is closed, or without a mirror.
  Status OpenTable() { return CheckProcess("").ok() ? kvpage::OpenTable(parts_) : Status(); }

  // ---- inspection: inspect.h, views.h ----
  PoolNumbers Numbers() { return inspect::Numbers(parts_); }
  // The state of slots that programs change, as the mirror has it.
  std::vector<SlotRow> Rows() { return inspect::Rows(parts_); }
  Status Audit() { return inspect::Audit(parts_); }
  Status BlockMap(std::int32_t slot, BlockReferences* out) { return inspect::BlockMap(parts_, slot, out); }
  Status BlockOwners(std::int32_t slot, BlockRows* out) { return inspect::BlockOwners(parts_, slot, out); }
  Status SlotMemory(std::int32_t slot, MemoryRanges* out) { return inspect::SlotMemory(parts_, slot, out); }
  Status AddView(std::int64_t layer, std::int32_t slot, const GoOn& go_on = {}) {
    return views::Add(parts_, layer, slot, go_on);
  }
  void RemoveView(std::int32_t slot) { views::Remove(parts_, slot); }

  // ---- programs: program_ops.h, map_ops.h, edit_ops.h, views.h; `op` begins every message ----
  // Checks that the program was compiled for this pool's spec and runs in its process.
  Status CheckProgram(const char* op, const SpecInts& spec) const;
  Status MapSlots(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* tokens,
                  std::int64_t count, bool* ok, std::uint32_t* epoch) {
    if (joint_ != nullptr) return joint_->Map(joint_index_, op, cache, slots, tokens, count, ok, epoch);
    return map_ops::MapSlots(parts_, op, cache, slots, tokens, count, ok, epoch);
  }
  Status MapChecked(const char* op, std::int32_t generation, const std::int32_t* slots, const std::int32_t* tokens,
                    std::int64_t count, bool* ok) {
    if (joint_ != nullptr) return joint_->MapChecked(joint_index_, op, generation, slots, tokens, count, ok);
    return map_ops::MapChecked(parts_, op, generation, slots, tokens, count, ok);
  }
  // The device has rejected a call of map_slots.
  void PassOverMap(std::int32_t generation) {
    if (joint_ != nullptr) joint_->PassOver(joint_index_, generation);
  }
  Status Begin(const char* op, const CacheRef& cache, const BatchRef& batch, std::int64_t layer, bool append,
               PinnedSlots* pinned, TableCall* by_block = nullptr) {
    return program_ops::Begin(parts_, op, cache, batch, layer, append, pinned, by_block);
  }
  Status Advance(const char* op, const CacheRef& cache, const BatchRef& batch, std::uint32_t* epoch,
                 std::int32_t* lengths) {
    return program_ops::Advance(parts_, op, cache, batch, epoch, lengths);
  }
  Status SetLengths(const char* op, const CacheRef& cache, const std::int32_t* slots, const std::int32_t* values,
                    std::int64_t count, std::uint32_t* epoch, std::int32_t* lengths) {
    return program_ops::SetLengths(parts_, op, cache, slots, values, count, epoch, lengths);
  }
  Status EditSlots(const char* op, const CacheRef& cache, const EditList& list, PinnedSlots* pinned,
                   std::uint32_t* epoch, std::int32_t* lengths) {
    return edit_ops::EditSlots(parts_, op, cache, list, pinned, epoch, lengths);
  }
  Status CopyRotated(const char* op, const CacheRef& cache, const SegmentList& list, PinnedSlots* pinned,
                     std::uint32_t* epoch, std::int32_t* lengths, std::vector<std::int32_t>* to) {
    return reuse::CopyRotated(parts_, op, cache, list, pinned, epoch, lengths, to);
  }
  Status CheckViews(const char* op, const CacheRef& cache, const std::vector<views::ViewRef>& arrays) {
    return views::Check(parts_, op, cache, arrays);
  }

 private:
  Pool(const Geometry& geometry, const PoolOptions& options, std::unique_ptr<Arena> arena, MapAccount* account,
       std::unique_ptr<Mirror> mirror);

  const int fork_count_;  // of the process when the pool was created
  SlotTable table_;
  Supply supply_;
  const std::unique_ptr<Mirror> mirror_;
  const PoolParts parts_;
  std::unique_ptr<prefix::Tier> tier_;  // null: no store
  std::shared_ptr<JointMaps> joint_;    // null: the pool stands alone
  std::size_t joint_index_ = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_POOL_H_
