#include "cache/prefix.h"

#include <algorithm>
#include <utility>

#include "cache/prefix_match.h"

namespace kvpage::prefix {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

std::int64_t CommonPrefix(const std::vector<std::int32_t>& a, const std::vector<std::int32_t>& b) {
  const auto end = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return end.first - a.begin();
}

// One call of Acquire: the mapping mutex is held throughout.
class Acquisition {
 public:
  Acquisition(const PoolParts& pool, const MappingLock& mapping, const std::vector<Request>& requests,
              const Options& options)
      : pool_(pool),
        table_(*pool.table),
        supply_(*pool.supply),
        mapping_(mapping),
        requests_(requests),
        options_(options),
        geometry_(pool.table->geometry()) {}

  Claim Run() {
    PrefixIndex& index = supply_.OpenIndex(mapping_);
    space_ = index.Namespace(options_.space);
    Claim claim = Attempt();
    while (!claim.status.ok()) {
      const bool short_of_blocks = claim.status.reason() == Reason::kOutOfBlocks && !pressed_;
      if (!donor_gone_ && !short_of_blocks) return claim;
      pressed_ = pressed_ || short_of_blocks;
      claim = Attempt();
    }
    Finish(&claim);
    for (std::size_t i = 0; i < hits_.size(); ++i) {
      if (hits_[i].leader >= 0) continue;  // the caller will ask again
      const std::int64_t taken = hits_[i].tokens;
      const std::int64_t fetched = index.Touch(space_, requests_[i].ids.data(), Length(requests_[i]), taken);
      supply_.counts(mapping_).queries += Length(requests_[i]);
      supply_.counts(mapping_).hits += taken;
      supply_.counts(mapping_).fetched += fetched;
    }
    return claim;
  }

 private:
  static std::int64_t Length(const Request& request) { return static_cast<std::int64_t>(request.ids.size()); }
  std::int64_t Room(std::size_t i) const { return std::max(requests_[i].tokens, Length(requests_[i])); }

  Claim Attempt() {
    hits_.assign(requests_.size(), {});
    donor_gone_ = false;
    supply_.SyncIndex(mapping_);
    for (std::size_t i = 0; i < hits_.size(); ++i) Find(i);
    Adopt();
    RefuseMappings();
    Claim claim = Occupy();
    if (claim.status.ok()) claim = Map();
    if (claim.status.ok()) claim.status = Publish();
    supply_.arena(mapping_).Drop(std::exchange(held_, {}));
    if (!claim.status.ok()) Undo();
    return claim;
  }

  // ---- lookup ----

  void Find(std::size_t i) {
    const std::vector<std::int32_t>& ids = requests_[i].ids;
    const std::int64_t limit = std::max<std::int64_t>(Length(requests_[i]) - (options_.whole ? 0 : 1), 0);
    Hit hit = FindHit(pool_, mapping_, space_, ids.data(), limit);
    hit.tokens -= hit.tokens % options_.unit;
    if (hit.tokens < options_.least) hit = {};
    for (std::size_t j = 0; options_.followers && j < i; ++j) {
      if (hits_[j].leader >= 0) continue;
      const std::int64_t common = std::min(CommonPrefix(requests_[j].ids, ids), limit);
      if (common - hit.tokens < geometry_.block_tokens || common < options_.least) continue;
      hit = {};
      hit.leader = static_cast<std::int32_t>(j);
      break;
    }
    hits_[i] = std::move(hit);
  }

  // A parked slot is adopted if the request continues where its sequence ends, or repeats the slot's prompt. It is not
  // adopted if this would destroy a sequence that merely has the same beginning.
  bool Adoptable(std::size_t i, std::int32_t slot) const {
    const Hit& hit = hits_[i];
    const Arena& arena = supply_.arena(mapping_);
    if (slot < 0 || arena.hole(slot) > 0 || arena.blocks(slot) < geometry_.BlocksFor(hit.tokens)) return false;
    // The request may write after the match, so neither another slot nor another request of this call may use these
    // blocks.
    const std::int64_t ranges = geometry_.num_ranges();
    std::int64_t shared = std::max(arena.SharedBlocks(slot), arena.ReadOnlyBlocks(slot));
    for (std::size_t j = 0; j < hits_.size(); ++j) {
      const std::vector<std::int32_t>& blocks = hits_[j].blocks;
      const auto most = std::min<std::int64_t>(blocks.size() / ranges, arena.blocks(slot));
      if (j != i) shared = std::max(shared, CommonBlocks(blocks.data(), arena.map(slot), most));
      if (hits_[j].kind == Hit::kAdopt && hits_[j].slot == slot) return false;
    }
    if (shared * geometry_.block_tokens > hit.tokens) return false;
    const StateLock state = table_.Lock();
    const HostSlot& row = table_.host(state, slot);
    const std::int64_t behind = static_cast<std::int64_t>(row.committed.size()) - hit.tokens;
    const bool same = row.prompt == Length(requests_[i]) && row.prompt - hit.tokens <= 1;
    return row.idle() && (behind <= 1 || same || pressed_);
  }

  // The end of the last block that two maps have in common.
  std::int64_t CommonBlocks(const std::int32_t* a, const std::int32_t* b, std::int64_t most) const {
    const std::int64_t ranges = geometry_.num_ranges();
    while (most > 0 && a[(most - 1) * ranges] != b[(most - 1) * ranges]) --most;
    return most;
  }

  void Adopt() {
    for (std::size_t i = 0; i < hits_.size(); ++i) {
      Hit& hit = hits_[i];
      if (hit.kind != Hit::kAlias) continue;
      const std::int32_t slot = std::exchange(hit.slot, -1);
      if (Adoptable(i, slot)) {
        hit.kind = Hit::kAdopt;
        hit.slot = slot;
      } else if (pressed_) {  // there is no memory for both the copy and its source
        hit.tokens -= hit.tokens % geometry_.block_tokens;
        hit.blocks.resize(Whole(hit) * geometry_.num_ranges());
        if (hit.tokens == 0) hit = {};
      }
    }
  }

  // If the process has too few memory mappings left, prefixes that need them count as not found.
  void RefuseMappings() {
    const Arena& arena = supply_.arena(mapping_);
    std::int64_t mappings = 0;
    for (const Hit& hit : hits_) mappings += arena.AliasMappings(Source(hit), Whole(hit));
    if (mappings == 0 || supply_.CanAlias(mapping_, mappings)) return;
    for (Hit& hit : hits_) {
      if (hit.kind == Hit::kFork || hit.kind == Hit::kAlias) hit = {};
    }
  }

  // Number of full blocks that a request maps, and the map that contains them.
  std::int64_t Whole(const Hit& hit) const {
    if (hit.kind == Hit::kFork) return table_.Lendable(table_.Lock(), hit.source, hit.tokens) / geometry_.block_tokens;
    return hit.kind == Hit::kAlias ? hit.tokens / geometry_.block_tokens : 0;
  }
  const std::int32_t* Source(const Hit& hit) const {
    return hit.kind == Hit::kFork ? supply_.arena(mapping_).map(hit.source) : hit.blocks.data();
  }

  // ---- slots ----

  Claim NoSlots(std::int64_t wanted, std::int64_t free) const {
    Claim claim = FailedClaim(ResourceExhausted("no free slot", Reason::kOutOfSlots));
    claim.wanted = wanted;
    claim.free = free;
    claim.draining = table_.NumDraining(table_.Lock());
    return claim;
  }

  // Gives every request a slot that no other claim can choose, adopted slots first.
  Claim Occupy() {
    Arena& arena = supply_.arena(mapping_);
    for (const Hit& hit : hits_) {
      if (hit.kind != Hit::kAlias) continue;
      // Held while slots and blocks are found: their slot may be emptied, and the index may drop them.
      arena.Hold(hit.blocks);
      held_.insert(held_.end(), hit.blocks.begin(), hit.blocks.end());
    }
    std::vector<std::size_t> empty, fresh;
    for (std::size_t i = 0; i < hits_.size(); ++i) {
      const Hit& hit = hits_[i];
      if (hit.kind == Hit::kAdopt) OccupyFound(i);
      if (hit.kind == Hit::kFork || hit.kind == Hit::kAlias) empty.push_back(i);
      if (hit.kind == Hit::kNone && hit.leader < 0) fresh.push_back(i);
    }
    const std::vector<std::int32_t> fewest = supply_.FewestBlocks(mapping_, empty.size());
    if (fewest.size() < empty.size()) return NoSlots(empty.size() + fresh.size(), fewest.size());
    for (std::size_t n = 0; n < empty.size(); ++n) {
      Hit& hit = hits_[empty[n]];
      if (Status status = supply_.Empty(mapping_, fewest[n]); !status.ok()) return FailedClaim(status);
      if (hit.kind == Hit::kAlias) {
        hit.slot = fewest[n];
        OccupyFound(empty[n]);
        continue;
      }
      const StateLock state = table_.Lock();
      const HostSlot& donor = table_.host(state, hit.source);
      // Another thread may have released it or started a new generation; this cannot happen while the lock is held.
      donor_gone_ =
          donor.state != SlotState::kOccupied || static_cast<std::int64_t>(donor.committed.size()) < hit.tokens;
      if (donor_gone_) return FailedClaim(Internal("acquire_prefix: a donor was released meanwhile"));
      hit.slot = fewest[n];
      table_.OccupyFork(state, hit.slot, hit.source, hit.tokens);
    }
    std::vector<std::int64_t> blocks;
    for (const std::size_t i : fresh) blocks.push_back(geometry_.BlocksFor(Room(i)));
    const std::vector<std::int32_t> fits = supply_.BestFits(mapping_, blocks);
    if (fits.size() < fresh.size()) return NoSlots(empty.size() + fresh.size(), empty.size() + fits.size());
    for (std::size_t n = 0; n < fresh.size(); ++n) {
      if (Status status = supply_.DropShared(mapping_, fits[n]); !status.ok()) return FailedClaim(status);
      hits_[fresh[n]].slot = fits[n];
      OccupyFound(fresh[n]);
    }
    return {};
  }

  void OccupyFound(std::size_t i) {
    const Hit& hit = hits_[i];
    const StateLock state = table_.Lock();
    table_.OccupyFound(state, hit.slot, space_, requests_[i].ids.data(), hit.tokens);
    occupied_.push_back(hit.slot);
  }

  // ---- blocks ----

  Claim Map() {
    Arena& arena = supply_.arena(mapping_);
    std::vector<Want> wants;
    std::vector<Supply::AliasRun> runs;
    for (std::size_t i = 0; i < hits_.size(); ++i) {
      const Hit& hit = hits_[i];
      if (hit.leader >= 0) continue;
      runs.push_back({hit.slot, Source(hit), Whole(hit)});
      wants.push_back({hit.slot, geometry_.BlocksFor(Room(i))});
    }
    if (Status status = supply_.Alias(mapping_, runs); !status.ok()) return FailedClaim(status);
    Claim claim = supply_.Reserve(mapping_, wants, &plan_);
    if (!claim.status.ok()) return claim;
    planned_ = true;
    for (const Grant& grant : plan_.grants) {
      blanked_ = blanked_ || supply_.Blanks(mapping_, grant.slot);
      const auto hit = std::find_if(hits_.begin(), hits_.end(), [&](const Hit& h) { return h.slot == grant.slot; });
      claim.status = supply_.Blank(mapping_, grant.slot, geometry_.BlocksFor(hit->tokens),
                                   std::min(grant.before, arena.blocks(grant.slot)));
      if (!claim.status.ok()) return claim;
    }
    for (const Hit& hit : hits_) {
      const std::int64_t whole = Whole(hit);
      if (hit.kind != Hit::kAlias || whole * geometry_.block_tokens == hit.tokens) continue;
      claim.status = arena.CopyBlock(hit.slot, whole, &hit.blocks[whole * geometry_.num_ranges()]);
      if (!claim.status.ok()) return claim;
      if (!table_.viewed(table_.Lock(), hit.slot)) continue;
      for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) arena.ZeroTail(hit.slot, layer, hit.tokens);
    }
    return claim;
  }

  Status Publish() {
    const Status status = PublishRoom(pool_, mapping_, plan_);
    if (!status.ok()) planned_ = false;  // it has been undone
    return status;
  }

  void Undo() {
    if (std::exchange(planned_, false)) supply_.Undo(mapping_, plan_);
    for (const Hit& hit : hits_) {
      if (hit.slot < 0 || hit.kind == Hit::kNone || hit.kind == Hit::kAdopt) continue;
      if (hit.kind == Hit::kFork || Occupied(hit.slot)) static_cast<void>(supply_.arena(mapping_).Shrink(hit.slot, 0));
    }
    const StateLock state = table_.Lock();
    for (const Hit& hit : hits_) {
      if (hit.slot < 0 || (hit.kind != Hit::kFork && !Occupied(hit.slot))) continue;
      table_.UndoFound(state, hit.slot, /*whole=*/!blanked_);
      if (hit.kind != Hit::kAdopt) table_.ForgetSequence(state, hit.slot);
    }
    occupied_.clear();
    blanked_ = false;
  }

  bool Occupied(std::int32_t slot) const {
    return std::find(occupied_.begin(), occupied_.end(), slot) != occupied_.end();
  }

  void Finish(Claim* claim) {
    for (const Hit& hit : hits_) {
      if (hit.kind == Hit::kAdopt) supply_.CutIndex(mapping_, hit.slot, hit.tokens);
    }
    const StateLock state = table_.Lock();
    for (std::size_t i = 0; i < hits_.size(); ++i) {
      const Hit& hit = hits_[i];
      claim->slots.push_back(hit.slot);
      claim->tokens.push_back(hit.tokens);
      claim->sources.push_back(hit.source);
      claim->leaders.push_back(hit.leader);
      claim->shared.push_back(hit.slot < 0 ? 0 : table_.progress(state).slots[hit.slot].shared);
      if (hit.slot < 0) continue;
      table_.Reserve(state, hit.slot, Room(i));
      table_.SetPrompt(state, hit.slot, Length(requests_[i]));
      table_.NoteCommit(state, hit.slot);
      if (pool_.mirror != nullptr) pool_.mirror->ClearVacated(hit.slot);
    }
  }

  const PoolParts& pool_;
  SlotTable& table_;
  Supply& supply_;
  const MappingLock& mapping_;
  const std::vector<Request>& requests_;
  const Options& options_;
  const Geometry& geometry_;
  std::int32_t space_ = -1;
  std::vector<Hit> hits_;
  std::vector<std::int32_t> held_;      // blocks with an additional reference
  std::vector<std::int32_t> occupied_;  // slots occupied by OccupyFound
  SupplyPlan plan_;
  bool planned_ = false;
  bool blanked_ = false;  // the memory of adopted slots after their last block may be overwritten
  bool donor_gone_ = false;
  bool pressed_ = false;  // blocks were short, so a sequence that would be evicted may be adopted instead
};

}  // namespace

Claim Acquire(const PoolParts& pool, const std::vector<Request>& requests, const Options& options) {
  const std::int64_t max_seq_len = pool.table->geometry().max_seq_len;
  for (const Request& request : requests) {
    const std::int64_t tokens = std::max<std::int64_t>(request.tokens, request.ids.size());
    if (tokens <= max_seq_len) continue;
    return FailedClaim(
        InvalidArgument("acquire_prefix: " + Number(tokens) + " tokens wanted, max_seq_len is " + Number(max_seq_len)));
  }
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, pool.table->Lock(), "acquire_prefix"); !status.ok()) return FailedClaim(status);
  return Acquisition(pool, mapping, requests, options).Run();
}

}  // namespace kvpage::prefix
