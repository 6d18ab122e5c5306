#include "cache/handover.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "cache/placing.h"
#include "vmm/headroom.h"
#include "vmm/system_error.h"

namespace kvpage::handover {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Begins calls for pools on CPU.
Status EnterOnHost(const PoolParts& pool, const StateLock& state, const char* op) {
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, op));
  if (pool.mirror == nullptr) return {};
  return {Code::kUnimplemented, std::string(op) +
                                    ": pools on CPU only: memory of a GPU is not handed over yet (shareable handles "
                                    "of the driver); read_kv gives keys and values as arrays for other transports"};
}

// The tokens of the slot, which programs have written.
Status CheckSlot(const PoolParts& pool, const StateLock& state, std::int32_t slot, std::int64_t* tokens) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(EnterOnHost(pool, state, "export_blocks"));
  KVPAGE_RETURN_IF_ERROR(table.CheckOccupied(state, "export_blocks", slot));
  const HostSlot& row = table.host(state, slot);
  const std::string name = "export_blocks: slot " + Number(slot);
  if (row.dropped > 0) {
    return FailedPrecondition(name + " has dropped its tokens below " + Number(row.dropped) +
                              " (pool.drop_before): such a sequence cannot be handed over");
  }
  *tokens = static_cast<std::int64_t>(row.committed.size());
  if (*tokens == 0) {
    return FailedPrecondition(name + " has no committed tokens: commit(slot, token_ids) names those to hand over");
  }
  const std::int64_t written = table.progress(state).WrittenInAllLayers(slot);
  if (written >= *tokens) return {};
  return FailedPrecondition(name + ": " + Number(*tokens) + " tokens are committed, " + Number(written) +
                            " are written in every layer so far: pass the newest cache, and the call waits for the "
                            "programs that write them");
}

Header MakeHeader(const PoolParts& pool, const StateLock& state, std::int32_t slot, std::string fingerprint) {
  const Geometry& geometry = pool.table->geometry();
  Header header;
  header.ids = pool.table->host(state, slot).committed;
  header.tokens = static_cast<std::int64_t>(header.ids.size());
  header.blocks = header.stride = geometry.BlocksFor(header.tokens);
  header.begin = HeaderBytes(header.tokens);
  header.block_bytes = geometry.block_bytes;
  header.ranges = geometry.num_ranges();
  header.shape = ShapeOf(geometry);
  header.fingerprint = std::move(fingerprint);
  return header;
}

// The tokens behind the last one become zeros: they are what an earlier owner of the memory has left, or not final.
Status ZeroTail(const Geometry& geometry, const Header& header, const MemoryFile& file) {
  const std::int64_t end = header.blocks * geometry.block_tokens;
  if (header.tokens == end) return {};
  const auto bytes = static_cast<std::size_t>(file.bytes());
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
  if (at == MAP_FAILED) return SystemError("export_blocks: mmap", file.bytes(), errno);
  KVView view = geometry.View(static_cast<char*>(at) + header.begin);
  if (geometry.layout == Layout::kPerLayer) {
    view.kv_stride = header.stride * header.block_bytes;
    view.layer_stride = 2 * view.kv_stride;
  }
  for (std::int64_t token = header.tokens; token < end; ++token) {
    for (std::int64_t layer = 0; layer < geometry.num_layers; ++layer) geometry.ZeroToken(view, 0, token, layer);
  }
  munmap(at, bytes);
  return {};
}

Status CopyOut(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, HandoverPtr* out) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  auto handover = std::make_shared<Handover>();
  Header& header = handover->header;
  // As a handler does that reads: meanwhile the slot keeps its blocks and its occupant.
  PinnedSlots pinned;
  {
    const MappingLock mapping = pool.supply->Lock();
    const StateLock state = table.Lock();
    std::int64_t tokens = 0;
    KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));
    header = MakeHeader(pool, state, slot, fingerprint);
    Pins pins;
    pins.sequences.push_back({slot, 0, 0, 0});
    pinned.Pin(state, &table, std::move(pins));
  }
  const std::int64_t range_bytes = header.blocks * header.block_bytes;
  KVPAGE_RETURN_IF_ERROR(CheckHeadroom(header.file_bytes()));
  KVPAGE_RETURN_IF_ERROR(MemoryFile::Make(header.file_bytes(), &handover->file));
  for (std::int64_t range = 0; range < header.ranges; ++range) {
    // A range of a slot is one piece of virtual memory, so the kernel copies it in one go.
    const char* const from = pool.supply->base() + geometry.Offset(slot, range, 0);
    KVPAGE_RETURN_IF_ERROR(handover->file->Write(header.Offset(range, 0), from, range_bytes));
  }
  KVPAGE_RETURN_IF_ERROR(ZeroTail(geometry, header, *handover->file));
  KVPAGE_RETURN_IF_ERROR(WriteHeader(header, handover->file.get()));
  KVPAGE_RETURN_IF_ERROR(handover->file->Seal());
  handover->copied = header.ranges * range_bytes;
  const MappingLock mapping = pool.supply->Lock();
  ++pool.supply->handovers(mapping).exported;
  pool.supply->handovers(mapping).bytes_copied_out += handover->copied;
  *out = std::move(handover);
  return {};
}

// Whether the slot's file can be sealed: it must hold exactly the slot's blocks.
bool CanSeal(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot) {
  const Arena& arena = pool.supply->arena(mapping);
  if (!arena.HasFile(slot) || arena.WholeFile(slot, arena.blocks(slot)) == nullptr) return false;
  const StateLock state = pool.table->Lock();
  return pool.table->host(state, slot).truncations == 0 && !pool.table->viewed(state, slot);
}

// No handler runs on the slot, and none begins.
Status SealNow(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const std::string& fingerprint,
               HandoverPtr* out) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  Arena& arena = pool.supply->arena(mapping);
  auto handover = std::make_shared<Handover>();
  Header& header = handover->header;
  const std::int64_t before = arena.blocks(slot);
  std::int64_t reserved = 0;
  {
    const StateLock state = table.Lock();
    header = MakeHeader(pool, state, slot, fingerprint);
    reserved = table.host(state, slot).reserved;
    if (const std::int64_t written = table.progress(state).WrittenInAllLayers(slot); written > header.tokens) {
      return FailedPrecondition("export_blocks: slot " + Number(slot) + " was acquired with handover=True and has " +
                                Number(written) + " tokens, of which " + Number(header.tokens) +
                                " are committed: commit or truncate the others, which would be lost");
    }
    // It gives up the room behind its tokens, which is in the file too.
    table.Retract(state, slot, header.tokens, header.tokens);
  }
  header.stride = geometry.max_blocks();
  header.begin = HeaderBytes(geometry.max_seq_len);
  handover->file = arena.WholeFile(slot, before);
  Status status = arena.Shrink(slot, header.blocks);
  for (std::int64_t layer = 0; status.ok() && layer < geometry.num_layers; ++layer) {
    arena.ZeroTail(slot, layer, header.tokens);
  }
  if (status.ok()) status = WriteHeader(header, handover->file.get());
  if (status.ok()) status = arena.SealFile(slot, header.blocks);
  if (!status.ok()) {
    if (arena.Grow(slot, before).ok()) table.Reserve(table.Lock(), slot, reserved);
    return status;
  }
  const StateLock state = table.Lock();
  // Behind its tokens too, in a partial block: to go on it truncates to its length, which copies that block.
  table.progress(state).slots[slot].shared = static_cast<std::int32_t>(header.blocks * geometry.block_tokens);
  ++pool.supply->handovers(mapping).exported;
  *out = std::move(handover);
  return {};
}

// `done`: false if the blocks are to be copied after all.
Status SealOut(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, const GoOn& go_on,
               HandoverPtr* out, bool* done) {
  SlotTable& table = *pool.table;
  Patience patience(go_on);
  while (true) {
    {
      const Gate gate(&table);
      {
        StateLock state = table.Lock();
        std::int64_t tokens = 0;
        KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));
        const auto idle = [&] { return table.progress(state).slots[slot].pins == 0 || table.closed(state); };
        if (!idle()) table.CountWait(state);
        static_cast<void>(table.WaitFor(&state, patience.seconds(), idle));
      }
      const MappingLock mapping = pool.supply->Lock();
      bool busy = false;
      {
        const StateLock state = table.Lock();
        std::int64_t tokens = 0;
        KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));  // again: it may have been released
        busy = table.progress(state).slots[slot].pins > 0;
      }
      *done = CanSeal(pool, mapping, slot);
      if (!*done) return {};
      if (!busy) return SealNow(pool, mapping, slot, fingerprint, out);
    }
    KVPAGE_RETURN_IF_ERROR(patience.Ask("export_blocks"));
  }
}

}  // namespace

Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = EnterOnHost(pool, table.Lock(), "acquire"); !status.ok()) return FailedClaim(status);
  for (const std::int64_t n : tokens) {
    if (n >= 0 && n <= geometry.max_seq_len) continue;
    return FailedClaim(InvalidArgument("acquire: num_tokens is " + Number(n) + ", wanted 0.." +
                                       Number(geometry.max_seq_len) + " (max_seq_len)"));
  }
  const std::int64_t begin = HeaderBytes(geometry.max_seq_len);
  std::vector<std::int32_t> slots;
  std::vector<Want> wants;
  Claim claim;
  for (std::size_t i = 0; claim.status.ok() && i < tokens.size(); ++i) {
    std::shared_ptr<MemoryFile> file;
    claim = placing::EmptySlot(pool, mapping);
    if (!claim.status.ok()) break;
    claim.status = MemoryFile::Make(begin + geometry.slot_bytes(), &file);
    if (!claim.status.ok()) break;
    slots.push_back(claim.slots[0]);
    wants.push_back({slots.back(), geometry.BlocksFor(tokens[i])});
    // Before anything is mapped, so that no claim takes the slots for parked ones.
    table.Occupy(table.Lock(), slots.back(), 0);
    pool.supply->arena(mapping).SetFile(slots.back(), std::move(file), begin);
  }
  if (claim.status.ok()) {
    SupplyPlan plan;
    claim = pool.supply->Reserve(mapping, wants, &plan);
  }
  if (!claim.status.ok()) {
    for (const std::int32_t slot : slots) placing::Leave(pool, mapping, slot);
    claim.slots.clear();
    return claim;
  }
  for (std::size_t i = 0; i < slots.size(); ++i) table.Reserve(table.Lock(), slots[i], tokens[i]);
  claim.slots = std::move(slots);
  return claim;
}

Status Export(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, const GoOn& go_on,
              HandoverPtr* out) {
  if (fingerprint.size() > static_cast<std::size_t>(kMaxFingerprint)) {
    return InvalidArgument("export_blocks: fingerprint has " + Number(static_cast<std::int64_t>(fingerprint.size())) +
                           " bytes, at most " + Number(kMaxFingerprint) + " are sent: send a hash of it");
  }
  bool seals = false;
  {
    const MappingLock mapping = pool.supply->Lock();
    {
      const StateLock state = pool.table->Lock();
      std::int64_t tokens = 0;
      KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));
    }
    seals = CanSeal(pool, mapping, slot);
  }
  if (seals) KVPAGE_RETURN_IF_ERROR(SealOut(pool, slot, fingerprint, go_on, out, &seals));
  return seals ? Status() : CopyOut(pool, slot, fingerprint, out);
}

Status Receive(int fd, HandoverPtr* out) {
  auto handover = std::make_shared<Handover>();
  KVPAGE_RETURN_IF_ERROR(MemoryFile::Receive(fd, &handover->file));
  KVPAGE_RETURN_IF_ERROR(ReadHeader(*handover->file, &handover->header));
  *out = std::move(handover);
  return {};
}

Claim Import(const PoolParts& pool, const Handover& handover, const std::string& fingerprint) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  const Header& header = handover.header;
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = EnterOnHost(pool, pool.table->Lock(), "import_blocks"); !status.ok()) return FailedClaim(status);
  if (Status status = CheckFits(header, geometry, fingerprint); !status.ok()) {
    return FailedClaim(status.WithMessage("import_blocks: " + status.message()));
  }
  std::shared_ptr<MemoryFile> file = handover.file;
  if (!file->received()) {  // of a pool of this process, which accounts for its memory
    if (Status status = MemoryFile::Receive(file->fd(), &file); !status.ok()) return FailedClaim(status);
  }
  Claim empty = placing::EmptySlot(pool, mapping);
  if (!empty.status.ok()) return empty;
  Arena& arena = pool.supply->arena(mapping);
  const std::int64_t whole = header.tokens / geometry.block_tokens;
  std::vector<std::int32_t> numbers, tail;
  const std::int64_t own = whole < header.blocks ? ranges : 0;
  Claim claim = pool.supply->ClaimBlocks(mapping, own, &tail);
  if (claim.status.ok()) {
    claim = pool.supply->ClaimNumbers(mapping, whole * ranges, &numbers);
    claim.wanted = header.blocks * ranges;
  }
  if (claim.status.ok()) {
    std::vector<std::int64_t> offsets;
    for (std::int64_t i = 0; i < whole * ranges; ++i) offsets.push_back(header.Offset(i / whole, i % whole));
    claim.status = arena.Receive(file, numbers, offsets);
    if (!claim.status.ok()) arena.UnclaimNumbers(std::exchange(numbers, {}));
  }
  if (claim.status.ok() && own > 0) claim.status = arena.OpenWindow();
  for (std::int64_t range = 0; claim.status.ok() && range < own; ++range) {
    char* const to = arena.window() + tail[range] * geometry.block_bytes;
    claim.status = file->Read(header.Offset(range, whole), to, geometry.block_bytes);
  }
  placing::Placed placed;
  if (claim.status.ok()) {
    placed.ids = header.ids;
    placed.blocks.resize(static_cast<std::size_t>(whole * ranges));
    // Neighbours in a range are neighbours by number, and in the file.
    for (std::int64_t i = 0; i < whole * ranges; ++i) placed.blocks[i % whole * ranges + i / whole] = numbers[i];
    placed.blocks.insert(placed.blocks.end(), tail.begin(), tail.end());
    claim.status = placing::Place(pool, mapping, empty.slots[0], placed);
  }
  arena.Drop(numbers);
  arena.Drop(tail);
  if (!claim.status.ok()) return claim;
  ++pool.supply->handovers(mapping).imported;
  pool.supply->handovers(mapping).bytes_copied_in += own * geometry.block_bytes;
  claim.slots = empty.slots;
  claim.tokens = {header.tokens};
  return claim;
}

void UndoImport(const PoolParts& pool, std::int32_t slot) {
  const MappingLock mapping = pool.supply->Lock();
  {
    const StateLock state = pool.table->Lock();
    if (pool.table->closed(state) || pool.table->host(state, slot).state != SlotState::kOccupied) return;
  }
  placing::Leave(pool, mapping, slot);
  --pool.supply->handovers(mapping).imported;
}

}  // namespace kvpage::handover
