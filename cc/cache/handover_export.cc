// The sending half of handover.h.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache/handover.h"
#include "cache/handover_copies.h"

namespace kvpage::handover {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

Status Unwritten(std::int32_t slot, std::int64_t tokens, std::int64_t written) {
  return FailedPrecondition("export_blocks: slot " + Number(slot) + ": " + Number(tokens) + " tokens are committed, " +
                            Number(written) +
                            " are written in every layer so far: pass the newest cache, and the call waits for the "
                            "programs that write them");
}

// The number of tokens that programs have written to the slot; with a mirror only the device knows it: see
// CheckWritten.
Status CheckSlot(const PoolParts& pool, const StateLock& state, std::int32_t slot, std::int64_t* tokens) {
  SlotTable& table = *pool.table;
  KVPAGE_RETURN_IF_ERROR(Enter(pool, state, "export_blocks"));
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
  if (pool.mirror != nullptr) return {};
  const std::int64_t written = table.progress(state).WrittenInAllLayers(slot);
  return written >= *tokens ? Status() : Unwritten(slot, *tokens, written);
}

// Reads the slot's marks from the device, after waiting for the programs that use it.
Status ReadMarks(const PoolParts& pool, const MappingLock&, std::int32_t slot, std::int64_t tokens,
                 Mirror::SlotMarks* marks) {
  if (pool.mirror == nullptr) {
    const StateLock state = pool.table->Lock();
    DeviceProgress& progress = pool.table->progress(state);
    *marks = {progress.WrittenInAllLayers(slot), progress.slots[slot].shared};
  } else {
    KVPAGE_RETURN_IF_ERROR(pool.mirror->ReadMarks(slot, marks));
  }
  return marks->written >= tokens ? Status() : Unwritten(slot, tokens, marks->written);
}

// `memory`: see Header.
Header MakeHeader(const PoolParts& pool, const StateLock& state, std::int32_t slot, std::string fingerprint,
                  std::string memory) {
  const Geometry& geometry = pool.table->geometry();
  Header header;
  header.ids = pool.table->host(state, slot).committed;
  header.tokens = static_cast<std::int64_t>(header.ids.size());
  header.blocks = geometry.BlocksFor(header.tokens);
  header.stride = memory.empty() ? header.blocks : 0;
  header.begin = HeaderBytes(header.tokens);
  header.block_bytes = geometry.block_bytes;
  header.ranges = geometry.num_ranges();
  header.shape = ShapeOf(geometry);
  header.memory = std::move(memory);
  header.fingerprint = std::move(fingerprint);
  return header;
}

Status CopyOut(const PoolParts& pool, std::int32_t slot, const std::string& fingerprint, HandoverPtr* out) {
  SlotTable& table = *pool.table;
  auto handover = std::make_shared<Handover>();
  // Pins the slot as a reading handler does, so that it keeps its blocks and its occupant.
  PinnedSlots pinned;
  {
    const MappingLock mapping = pool.supply->Lock();
    std::string memory;
    KVPAGE_RETURN_IF_ERROR(pool.supply->arena(mapping).MemoryName(&memory));
    std::int64_t tokens = 0;
    {
      const StateLock state = table.Lock();
      KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));
      handover->header = MakeHeader(pool, state, slot, fingerprint, memory);
      if (pool.mirror == nullptr) {
        Pins pins;
        pins.sequences.push_back({slot, 0, 0, 0});
        pinned.Pin(state, &table, std::move(pins));
      }
    }
    if (!memory.empty()) {
      // Device copies are fast and are mapped at places owned by the pool, so this holds the lock.
      Mirror::SlotMarks marks;
      KVPAGE_RETURN_IF_ERROR(ReadMarks(pool, mapping, slot, tokens, &marks));
      KVPAGE_RETURN_IF_ERROR(CopyToHandles(pool, mapping, slot, handover.get()));
    }
  }
  if (handover->header.memory.empty()) KVPAGE_RETURN_IF_ERROR(CopyToFile(pool, slot, handover.get()));
  const Header& header = handover->header;
  handover->copied = header.ranges * header.blocks * header.block_bytes;
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

// The state of a slot before a call seals its blocks, for restoring it on failure.
struct Found {
  std::int64_t blocks = 0, reserved = 0;
  std::int32_t shared = 0;
};

// Keeps programs on a device from using the slot until PublishSlots.
Status StopPrograms(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot) {
  if (pool.mirror == nullptr) return {};
  pool.table->CountWait(pool.table->Lock());
  Status status = pool.mirror->StopReaders({{slot, 0}});
  if (!status.ok()) static_cast<void>(PublishSlots(pool, mapping, {slot}, /*stopped=*/true));
  return status;
}

// Prepares the slot and its file for sending: drops the room after the tokens, zeroes the tail of the last block and
// writes the header; on a device, also exports descriptors and makes the blocks read-only for programs. Seals nothing
// yet.
Status Prepare(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, Handover* handover) {
  Arena& arena = pool.supply->arena(mapping);
  const Header& header = handover->header;
  KVPAGE_RETURN_IF_ERROR(arena.Shrink(slot, header.blocks));
  KVPAGE_RETURN_IF_ERROR(ZeroBehind(pool, mapping, slot, header.tokens));
  KVPAGE_RETURN_IF_ERROR(WriteHeader(header, handover->file.get()));
  if (header.memory.empty()) return {};
  std::vector<std::int32_t> blocks;
  for (std::int64_t i = 0; i < header.num_handles(); ++i) {
    blocks.push_back(arena.map(slot)[i % header.blocks * header.ranges + i / header.blocks]);
  }
  KVPAGE_RETURN_IF_ERROR(arena.ExportBlocks(blocks, &handover->handles));
  if (pool.mirror == nullptr) return {};
  const std::int64_t end = header.blocks * pool.table->geometry().block_tokens;
  KVPAGE_RETURN_IF_ERROR(pool.mirror->SetShared(slot, static_cast<std::int32_t>(end)));
  return PublishSlots(pool, mapping, {slot}, /*stopped=*/true);
}

void PutBack(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const Found& found) {
  if (pool.supply->arena(mapping).Grow(slot, found.blocks).ok()) {
    pool.table->Reserve(pool.table->Lock(), slot, found.reserved);
  }
  if (pool.mirror == nullptr) return;
  static_cast<void>(pool.mirror->SetShared(slot, found.shared));
  static_cast<void>(PublishSlots(pool, mapping, {slot}, /*stopped=*/true));
}

// The caller guarantees that no handler uses the slot and that none can start.
Status SealNow(const PoolParts& pool, const MappingLock& mapping, std::int32_t slot, const std::string& fingerprint,
               HandoverPtr* out) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  Arena& arena = pool.supply->arena(mapping);
  auto handover = std::make_shared<Handover>();
  Header& header = handover->header;
  std::string memory;
  KVPAGE_RETURN_IF_ERROR(arena.MemoryName(&memory));
  Found found;
  found.blocks = arena.blocks(slot);
  {
    const StateLock state = table.Lock();
    header = MakeHeader(pool, state, slot, fingerprint, std::move(memory));
    found.reserved = table.host(state, slot).reserved;
  }
  if (header.memory.empty()) header.stride = geometry.max_blocks();
  header.begin = HeaderBytes(geometry.max_seq_len);
  handover->file = arena.WholeFile(slot, found.blocks);
  KVPAGE_RETURN_IF_ERROR(StopPrograms(pool, mapping, slot));
  Mirror::SlotMarks marks;
  Status status = ReadMarks(pool, mapping, slot, header.tokens, &marks);
  found.shared = marks.shared;
  if (status.ok() && marks.written > header.tokens) {
    status = FailedPrecondition("export_blocks: slot " + Number(slot) + " was acquired with handover=True and has " +
                                Number(marks.written) + " tokens, of which " + Number(header.tokens) +
                                " are committed: commit or truncate the others, which would be lost");
  }
  if (!status.ok()) {
    if (pool.mirror != nullptr) static_cast<void>(PublishSlots(pool, mapping, {slot}, /*stopped=*/true));
    return status;
  }
  // Give up the room after the tokens, which the file contains too.
  table.Retract(table.Lock(), slot, header.tokens, header.tokens);
  status = Prepare(pool, mapping, slot, handover.get());
  if (status.ok()) status = arena.SealFile(slot, header.blocks);
  if (!status.ok()) {
    PutBack(pool, mapping, slot, found);
    return status;
  }
  const StateLock state = table.Lock();
  // This includes the rest of a partial block: to continue, a sequence truncates to its own length, which copies that
  // block.
  table.progress(state).slots[slot].shared = static_cast<std::int32_t>(header.blocks * geometry.block_tokens);
  ++pool.supply->handovers(mapping).exported;
  *out = std::move(handover);
  return {};
}

// Sets `done` to false if the blocks must be copied instead.
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
        KVPAGE_RETURN_IF_ERROR(CheckSlot(pool, state, slot, &tokens));  // it may have been released
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

}  // namespace kvpage::handover
