#include "device/fault.h"

#include <algorithm>
#include <string>

#include "cache/messages.h"
#include "cache/registry.h"

namespace kvpage {

Status DescribeFault(const Fault& fault, std::int32_t id, const SpecInts& spec) {
  const std::string op = OpName(static_cast<DeviceOp>(fault.op));
  const auto number = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::kNone:
      break;
    case FaultKind::kNoPool:
      return NotHere(op, number(fault.have));
    case FaultKind::kClosed:
      return messages::Closed(op, id);
    case FaultKind::kSpec: {
      SpecInts program = spec;
      program[std::clamp(fault.index, 0, kNumSpecFields - 1)] = fault.wanted;
      return messages::OtherSpec(op, id, program, spec);
    }
    case FaultKind::kGeneration:
      return messages::OtherGeneration(op, id, fault.wanted, fault.have);
    case FaultKind::kEpoch:
      return messages::StaleEpoch(op, id, fault.wanted, fault.have);
    case FaultKind::kSlotEpoch:
      return messages::StaleSlot(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kSlotRange:
      return messages::SlotRange(op, fault.slot, spec[kSpecMaxSlots]);
    case FaultKind::kSlotTwice:
      return messages::SlotTwice(op, fault.slot);
    case FaultKind::kSlotFree:
      return messages::SlotFree(op, fault.slot);
    case FaultKind::kSlotTaken:
      return messages::SlotTaken(op, fault.slot, "already occupied in this cache");
    case FaultKind::kOffsetsStart:
      return messages::OffsetsStart(op, fault.have);
    case FaultKind::kOffsetsOrder:
      return messages::OffsetsOrder(op, fault.index, fault.wanted, fault.have);
    case FaultKind::kOffsetsEnd:
      return messages::OffsetsEnd(op, fault.wanted, fault.have);
    case FaultKind::kLayer:
      return messages::LayerRange(op, fault.wanted, spec[kSpecNumLayers]);
    case FaultKind::kMaxSeqLen:
      return messages::MaxSeqLen(op, fault.slot, fault.wanted, spec[kSpecMaxSeqLen]);
    case FaultKind::kUnmapped:
      return messages::Unmapped(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kUnwritten:
      return fault.layer < 0 ? messages::UnwrittenSomewhere(op, fault.slot, fault.wanted, fault.runs)
                             : messages::Unwritten(op, fault.slot, fault.layer, fault.wanted, fault.have);
    case FaultKind::kLength:
      return messages::LengthUnwritten(op, fault.slot, fault.layer, fault.wanted, fault.have);
    case FaultKind::kWrittenTwice:
      return messages::WrittenTwice(op, fault.slot, fault.layer, fault.wanted);
    case FaultKind::kBelowShared:
      return messages::BelowShared(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kShared:
      return messages::Shared(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kDonorEdited:
      return messages::DonorEdited(op, fault.slot, number(fault.have));
    case FaultKind::kDropped:
      return messages::Dropped(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kBelowDropped:
      return messages::BelowDropped(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kDropBeyond:
      return messages::DropBeyond(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kNoTable:
      return messages::NoTable(op, id);
    case FaultKind::kRaise:
      return messages::NotLowered(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kForeignCache:
      return messages::ForeignCache(op, number(fault.wanted), number(fault.have));
    case FaultKind::kOpcode:
      return messages::UnknownOpcode(op, fault.slot, fault.wanted);
    case FaultKind::kCopyTokens:
      return messages::CopyTokens(op, fault.slot, fault.wanted, fault.have);
    case FaultKind::kCopyTwice:
      return messages::CopyTwice(op, fault.slot);
    case FaultKind::kCopyChain:
      return messages::CopyChain(op, fault.slot);
    case FaultKind::kCommittedAhead:
      return messages::CommittedAhead(op, fault.slot, fault.wanted, fault.have);
  }
  return Internal(op + ": the device recorded a fault of unknown kind " + std::to_string(fault.kind));
}

}  // namespace kvpage
