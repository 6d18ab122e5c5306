#include "cache/program_check.h"

namespace kvpage {
namespace {

Status CheckOffsets(const char* op, const BatchRef& batch) {
  const std::int32_t* offsets = batch.offsets;
  if (offsets[0] != 0) return messages::OffsetsStart(op, offsets[0]);
  for (std::int64_t s = 0; s < batch.num_sequences; ++s) {
    if (offsets[s + 1] < offsets[s]) return messages::OffsetsOrder(op, s, offsets[s], offsets[s + 1]);
  }
  const std::int32_t last = offsets[batch.num_sequences];
  if (batch.num_tokens >= 0 && last > batch.num_tokens) return messages::OffsetsEnd(op, last, batch.num_tokens);
  return {};
}

}  // namespace

Status ProgramCheck::Refusal() const {
  SlotTable& table = *pool_.table;
  KVPAGE_RETURN_IF_ERROR(table.CheckOpen(state_, op_));
  const DeviceProgress& progress = table.progress(state_);
  if (cache_.generation != progress.generation) {
    return messages::OtherGeneration(op_, table.id(), cache_.generation, progress.generation);
  }
  if (!progress.fault.ok()) return progress.fault;
  return messages::StaleEpoch(op_, table.id(), cache_.epoch, progress.epoch);
}

Status ProgramCheck::Batch(const BatchRef& batch, std::vector<Sequence>* sequences) const {
  KVPAGE_RETURN_IF_ERROR(CheckOffsets(op_, batch));
  sequences->reserve(batch.num_sequences);
  for (std::int64_t s = 0; s < batch.num_sequences; ++s) {
    const std::int32_t slot = batch.slots[s];
    if (slot == -1) continue;
    KVPAGE_RETURN_IF_ERROR(OccupiedSlot(slot));
    const std::int32_t count = batch.offsets[s + 1] - batch.offsets[s];
    if (count == 0) continue;
    sequences->push_back({slot, batch.offsets[s], count, cache_.lengths[slot]});
  }
  return {};
}

}  // namespace kvpage
