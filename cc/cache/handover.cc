#include "cache/handover.h"

#include <fcntl.h>

#include <cerrno>
#include <string>
#include <utility>

#include "cache/handover_copies.h"
#include "cache/placing.h"
#include "vmm/system_error.h"

namespace kvpage::handover {
namespace {

std::string Number(std::int64_t value) { return std::to_string(value); }

// Backs the numbered blocks, [ranges, whole], with the full blocks of the sequence.
Status ReceiveWhole(const PoolParts& pool, const MappingLock& mapping, const Handover& handover, std::int64_t whole,
                    const std::vector<std::int32_t>& numbers) {
  Arena& arena = pool.supply->arena(mapping);
  const Header& header = handover.header;
  std::vector<std::int64_t> offsets;
  std::vector<int> descriptors;
  for (std::int64_t i = 0; i < whole * header.ranges; ++i) {
    const std::int64_t range = i / whole, block = i % whole;
    if (arena.shares_handles()) {
      descriptors.push_back(handover.handles[range * header.blocks + block].get());
    } else {
      offsets.push_back(header.Offset(range, block));
    }
  }
  if (arena.shares_handles()) return arena.ReceiveHandles(descriptors, numbers);
  std::shared_ptr<MemoryFile> file = handover.file;
  if (!file->received()) {  // from a pool in this process, which already accounts for its memory
    KVPAGE_RETURN_IF_ERROR(MemoryFile::Receive(file->fd(), &file));
  }
  return arena.Receive(file, numbers, offsets);
}

}  // namespace

Claim Acquire(const PoolParts& pool, const std::vector<std::int64_t>& tokens) {
  SlotTable& table = *pool.table;
  const Geometry& geometry = table.geometry();
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, table.Lock(), "acquire"); !status.ok()) return FailedClaim(status);
  for (const std::int64_t n : tokens) {
    if (n >= 0 && n <= geometry.max_seq_len) continue;
    return FailedClaim(InvalidArgument("acquire: num_tokens is " + Number(n) + ", wanted 0.." +
                                       Number(geometry.max_seq_len) + " (max_seq_len)"));
  }
  const std::int64_t begin = HeaderBytes(geometry.max_seq_len);
  const bool handles = pool.supply->arena(mapping).shares_handles();
  std::vector<std::int32_t> slots;
  std::vector<Want> wants;
  Claim claim = placing::EmptySlots(pool, mapping, tokens.size());
  for (std::size_t i = 0; claim.status.ok() && i < tokens.size(); ++i) {
    std::shared_ptr<MemoryFile> file;
    claim.status = MemoryFile::Make(begin + (handles ? 0 : geometry.slot_bytes()), &file);
    if (!claim.status.ok()) break;
    slots.push_back(claim.slots[i]);
    wants.push_back({slots.back(), geometry.BlocksFor(tokens[i])});
    // Before anything is mapped, so that no claim uses the slots as parked ones.
    table.Occupy(table.Lock(), slots.back(), 0);
    pool.supply->arena(mapping).SetFile(slots.back(), std::move(file), begin);
  }
  if (claim.status.ok()) {
    SupplyPlan plan;
    claim = pool.supply->Reserve(mapping, wants, &plan);
    if (claim.status.ok()) claim.status = PublishRoom(pool, mapping, plan);
  }
  if (!claim.status.ok()) {
    for (const std::int32_t slot : slots) placing::Leave(pool, mapping, slot);
    claim.slots.clear();
    return claim;
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    table.Reserve(table.Lock(), slots[i], tokens[i]);
    if (pool.mirror != nullptr) pool.mirror->ClearVacated(slots[i]);
  }
  claim.slots = std::move(slots);
  return claim;
}

Status Receive(const std::vector<int>& descriptors, HandoverPtr* out) {
  auto handover = std::make_shared<Handover>();
  if (descriptors.empty()) return InvalidArgument("no descriptor: wanted those that export_blocks of the sender made");
  KVPAGE_RETURN_IF_ERROR(MemoryFile::Receive(descriptors[0], &handover->file));
  KVPAGE_RETURN_IF_ERROR(ReadHeader(*handover->file, &handover->header));
  const auto handles = static_cast<std::int64_t>(descriptors.size()) - 1;
  if (handles != handover->header.num_handles()) {
    return InvalidArgument("the sequence has " + Number(handover->header.num_handles()) +
                           " blocks in memory of a device, a descriptor each, and " + Number(handles) +
                           " came with it: send all of Handover.filenos(), as Handover.send does");
  }
  for (std::int64_t i = 1; i <= handles; ++i) {
    handover->handles.emplace_back(fcntl(descriptors[i], F_DUPFD_CLOEXEC, 0));
    if (handover->handles.back().ok()) continue;
    if (errno == EBADF) {
      return InvalidArgument("descriptor " + Number(descriptors[i]) + " is not open in this process");
    }
    const Status status = SystemError("import_blocks: fcntl(F_DUPFD_CLOEXEC)", -1, errno);
    return FailedPrecondition(status.message() + ": the sequence takes " + Number(handles + 1) +
                              " descriptors: raise `ulimit -n`");
  }
  *out = std::move(handover);
  return {};
}

Claim Import(const PoolParts& pool, const Handover& handover, const std::string& fingerprint) {
  const Geometry& geometry = pool.table->geometry();
  const std::int64_t ranges = geometry.num_ranges();
  const Header& header = handover.header;
  const MappingLock mapping = pool.supply->Lock();
  if (Status status = Enter(pool, pool.table->Lock(), "import_blocks"); !status.ok()) return FailedClaim(status);
  Arena& arena = pool.supply->arena(mapping);
  std::string memory;
  if (Status status = arena.MemoryName(&memory); !status.ok()) return FailedClaim(status);
  if (Status status = CheckFits(header, geometry, memory, fingerprint); !status.ok()) {
    return FailedClaim(status.WithMessage("import_blocks: " + status.message()));
  }
  Claim empty = placing::EmptySlots(pool, mapping, 1);
  if (!empty.status.ok()) return empty;
  const std::int32_t slot = empty.slots[0];
  const std::int64_t whole = header.tokens / geometry.block_tokens;
  std::vector<std::int32_t> numbers, tail;
  const std::int64_t own = whole < header.blocks ? ranges : 0;
  Claim claim = pool.supply->ClaimBlocks(mapping, own, &tail);
  if (claim.status.ok()) {
    claim = pool.supply->ClaimNumbers(mapping, whole * ranges, &numbers);
    claim.wanted = header.blocks * ranges;
  }
  if (claim.status.ok()) {
    claim.status = ReceiveWhole(pool, mapping, handover, whole, numbers);
    if (!claim.status.ok()) arena.UnclaimNumbers(std::exchange(numbers, {}));
  }
  if (claim.status.ok() && own > 0) claim.status = CopyLast(pool, mapping, handover, tail);
  placing::Placed placed;
  if (claim.status.ok()) {
    placed.ids = header.ids;
    placed.blocks.resize(static_cast<std::size_t>(whole * ranges));
    // Blocks adjacent in a range are adjacent in number and in the file.
    for (std::int64_t i = 0; i < whole * ranges; ++i) placed.blocks[i % whole * ranges + i / whole] = numbers[i];
    placed.blocks.insert(placed.blocks.end(), tail.begin(), tail.end());
    claim.status = placing::Place(pool, mapping, slot, placed);
  }
  arena.Drop(numbers);
  arena.Drop(tail);
  if (!claim.status.ok()) return claim;
  ++pool.supply->handovers(mapping).imported;
  pool.supply->handovers(mapping).bytes_copied_in += own * geometry.block_bytes;
  claim.slots = {slot};
  claim.tokens = {header.tokens};
  claim.shared = {pool.table->progress(pool.table->Lock()).slots[slot].shared};
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
