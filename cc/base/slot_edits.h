// The operands of edit_slots, the op that all host calls queue: a list of edits and a list of copies.
//
// The whole list is checked before anything changes. Each slot may be used by only one edit, and each copy target by
// only one copy and by no copy as its source. Edits are applied first, then the copies, between slots that are occupied
// after the edits.
#ifndef KVPAGE_BASE_SLOT_EDITS_H_
#define KVPAGE_BASE_SLOT_EDITS_H_

#include <cstdint>

namespace kvpage {

// The numbers are part of compiled programs: append, never renumber.
enum class SlotOpcode : std::int32_t {
  kOccupy = 0,  // a free slot becomes an empty sequence: length 0, nothing written
  kVacate,      // an occupied slot becomes free: length -1
  kSetLength,   // an occupied slot's length is lowered to `length`
  kFork,  // a free slot becomes a sequence with the first `length` tokens of `donor`. Full blocks are already mapped in
          // both slots and count as written; a partial last block is copied by the same list
  kTruncate,  // like kSetLength; what the slot has mapped from `length` on is no longer shared: shared blocks have been
              // replaced
  kFound,     // a free slot becomes a sequence with `length` tokens, which are already in its memory and must not be
              // written
  kDrop,      // an occupied slot no longer has its tokens below `length`, a block boundary
  kSwapIn,    // a free slot becomes a sequence with `length` tokens, which are already in its memory; the first `donor`
              // of them must not be written
};

// A row of the operand int32[n, 4].
struct SlotEdit {
  std::int32_t opcode = 0;  // SlotOpcode
  std::int32_t slot = -1;   // -1: padding
  std::int32_t length = 0;  // kSetLength, kFork, kTruncate, kFound, kDrop and kSwapIn
  std::int32_t donor = -1;  // kFork; kSwapIn: a number of tokens
};

// A row of the operand int32[m, 4]: tokens first .. first + count - 1 of all layers (keys, values and scales), copied
// from one slot to the same positions of another. The target then counts as written up to their end.
struct TokenCopy {
  std::int32_t source = -1;  // -1: padding
  std::int32_t target = -1;
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int64_t end() const { return std::int64_t{first} + count; }
};

struct EditList {
  const SlotEdit* edits = nullptr;
  std::int64_t num_edits = 0;
  const TokenCopy* copies = nullptr;
  std::int64_t num_copies = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_BASE_SLOT_EDITS_H_
