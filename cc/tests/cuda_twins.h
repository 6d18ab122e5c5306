// A pool on the CPU and the same pool on the emulated device: every op runs on both, and must give the same result.
#ifndef KVPAGE_TESTS_CUDA_TWINS_H_
#define KVPAGE_TESTS_CUDA_TWINS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "device/fault.h"
#include "tests/cuda_twins_values.h"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"
#include "tests/pool_util.h"

namespace kvpage::testing {

// A pool and the same pool on the device. Every op runs on both and returns the error message, or "" for none.
class Twins {
 public:
  Twins(const Geometry& geometry, std::int64_t blocks, bool allow_stale, std::uint64_t seed, bool debug = false)
      : geometry_(geometry),
        options_{allow_stale, /*poison=*/false, debug},
        pool_(MakePool(geometry, blocks, options_)),
        rows_(table_.Add(geometry.spec(), pool_->View(), kId)),
        rng_(seed) {
    pool_->set_id(kId);
    rows_.entry().allow_stale = allow_stale;
    rows_.entry().debug = debug;
    NewGeneration();
  }

  static constexpr std::int32_t kId = 700;  // its entry is not the first one

  const Geometry& geometry() const { return geometry_; }
  Pool& pool() { return *pool_; }
  bool allow_stale() const { return options_.allow_stale; }
  bool Exists(std::int32_t slot) const { return slot >= 0 && slot < geometry_.max_slots; }
  SlotState StateOf(std::int32_t slot) {
    for (const SlotRow& row : pool_->Rows()) {
      if (row.slot == slot) return row.state;
    }
    return SlotState::kFree;
  }
  PoolRows& rows() { return rows_; }
  Rng& rng() { return rng_; }
  const Value& value() const { return value_; }
  const std::set<std::string>& kinds() const { return kinds_; }
  std::int64_t num_passed() const { return passed_; }

  // Does what pool.cache() does on a device.
  void NewGeneration() {
    Pool::Generation generation;
    EXPECT_OK(pool_->NewGeneration(&generation));
    value_ = {generation.generation, generation.epoch, generation.lengths};
    DevicePool& entry = rows_.entry();
    entry.generation = generation.generation;
    EXPECT_EQ(entry.epoch + 1, generation.epoch);
    entry.epoch = generation.epoch;
    for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
      DeviceSlot& row = rows_.slot(slot);
      row.since = generation.epoch;
      row.released = generation.lengths[slot] < 0 ? 1 : 0;
      if (row.released != 0) row.shared = 0;
      EXPECT_TRUE(generation.lengths[slot] < 0 || row.length == generation.lengths[slot])
          << "slot " << slot << " " << row.length;
      for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) {
        rows_.written(slot, layer) = std::min(rows_.written(slot, layer), row.length);
      }
    }
    history_.clear();
    forged_ = false;
  }

  void PublishRooms() {
    for (const SlotRow& row : pool_->Rows()) {
      if (row.state != SlotState::kOccupied) continue;
      const std::int64_t mapped = geometry_.BlocksFor(row.reserved) * geometry_.block_tokens;
      rows_.slot(row.slot).room = static_cast<std::int32_t>(std::min(mapped, geometry_.max_seq_len));
    }
  }

  // Returns the newest cache, or an outdated or invalid one.
  Value PickValue() {
    Value value = value_;
    const int kind = Pick(rng_, 0, 39);
    if (kind < 4 && !history_.empty()) value = history_[rng_() % history_.size()];
    if (kind == 4) value.epoch += static_cast<std::uint32_t>(Pick(rng_, 1, 1000));
    if (kind == 5) value.generation += Pick(rng_, 0, 1) * 2 - 1;
    return value;
  }

  // Like PickValue, or the newest cache with one length changed by the program.
  Value PickForged() {
    if (Pick(rng_, 0, 9) != 0) return PickValue();
    Value value = value_;
    std::int32_t& length = value.lengths[rng_() % value.lengths.size()];
    length = Pick(rng_, 0, 9) == 0 ? std::numeric_limits<std::int32_t>::max() : Pick(rng_, -2, 70);
    forged_ = true;
    return value;
  }

  void Keep(const Value& value) {
    history_.push_back(value);
    if (history_.size() > 12) history_.pop_front();
  }

  std::string Begin(DeviceOp op, const Value& value, const Ragged& batch, std::int32_t layer, bool probe = false) {
    const bool append = op == DeviceOp::kAppendKV || op == DeviceOp::kUpdateAndAttend;
    Value cpu = value;
    Status status;
    {
      PinnedSlots pinned;
      status = pool_->Begin(OpName(op), Ref(value), Ref(batch), layer, append, &pinned);
      if (append && status.ok()) cpu.epoch = pinned.epoch();
    }
    Value device = value;
    const Operands operands(this, op, &device, batch.slots, batch.offsets);
    const auto at = Ints({layer});
    const auto scratch = Scratch(static_cast<std::int64_t>(batch.slots.size()), geometry_.max_slots);
    const cuda::BatchOperands batch_operands = {operands.slots(), operands.numbers(),
                                                static_cast<std::int64_t>(batch.slots.size()), batch.num_tokens};
    const std::vector<char> before = rows_.State();
    if (append) {
      // Only the check runs: without new tokens there are no keys and values to write.
      const auto row = static_cast<std::size_t>(geometry_.num_kv_heads * geometry_.head_dim) * sizeof(float);
      const auto k = Exactly<char>(static_cast<std::size_t>(std::max<std::int64_t>(batch.num_tokens, 0)) * row);
      EXPECT_OK(
          cuda::AppendKV(operands.cache(), batch_operands,
                         {at.get(), k.get(), k.get(), DType::kF32, static_cast<std::int32_t>(geometry_.num_kv_heads),
                          static_cast<std::int32_t>(geometry_.head_dim)},
                         operands.new_epoch(), scratch.get(), nullptr));
    } else {
      EXPECT_OK(
          cuda::GatherContext(operands.cache(), batch_operands, at.get(), 0, nullptr, nullptr, scratch.get(), nullptr));
    }
    const std::string text = Compare(op, status, before);
    EXPECT_TRUE(!append || operands.new_epoch()[0] == cpu.epoch) << text;
    CheckSequences(*reinterpret_cast<CheckedBatch*>(scratch.get()), batch, value, layer, status.ok());
    if (append && !probe) Next(status.ok(), value, cpu);
    return text;
  }

  std::string Advance(const Value& value, const Ragged& batch) {
    Value cpu = value;
    const auto count = static_cast<std::int64_t>(batch.slots.size());
    const Status status = pool_->Advance("advance", Ref(value), {batch.slots.data(), count, batch.offsets.data(), -1},
                                         &cpu.epoch, cpu.lengths.data());
    Value device = value;
    const Operands operands(this, DeviceOp::kAdvance, &device, batch.slots, batch.offsets);
    const std::vector<char> before = rows_.State();
    EXPECT_OK(cuda::Advance(operands.cache(), {operands.slots(), operands.numbers(), count, -1}, operands.new_epoch(),
                            operands.new_lengths(), nullptr));
    return Finish(DeviceOp::kAdvance, status, before, value, cpu, operands);
  }

  std::string SetLengths(const Value& value, const Named& named) {
    Value cpu = value;
    const auto count = static_cast<std::int64_t>(named.slots.size());
    const Status status = pool_->SetLengths("set_lengths", Ref(value), named.slots.data(), named.numbers.data(), count,
                                            &cpu.epoch, cpu.lengths.data());
    Value device = value;
    const Operands operands(this, DeviceOp::kSetLengths, &device, named.slots, named.numbers);
    const std::vector<char> before = rows_.State();
    EXPECT_OK(cuda::SetLengths(operands.cache(), operands.slots(), operands.numbers(), count, operands.new_epoch(),
                               operands.new_lengths(), nullptr));
    return Finish(DeviceOp::kSetLengths, status, before, value, cpu, operands);
  }

  std::string ChangeOwner(const Value& value, const std::vector<std::int32_t>& slots, bool occupy) {
    std::vector<SlotEdit> edits;
    const SlotOpcode opcode = occupy ? SlotOpcode::kOccupy : SlotOpcode::kVacate;
    for (const std::int32_t slot : slots) edits.push_back({static_cast<std::int32_t>(opcode), slot, 0});
    return EditSlots(occupy ? DeviceOp::kAcquire : DeviceOp::kRelease, value, edits, {});
  }

  std::string EditSlots(DeviceOp op, const Value& value, const std::vector<SlotEdit>& edits,
                        const std::vector<TokenCopy>& copies) {
    Value cpu = value;
    const auto list = [&](const SlotEdit* e, const TokenCopy* c) {
      return EditList{e, static_cast<std::int64_t>(edits.size()), c, static_cast<std::int64_t>(copies.size())};
    };
    Status status;
    {
      PinnedSlots pinned;
      status = pool_->EditSlots(OpName(op), Ref(value), list(edits.data(), copies.data()), &pinned, &cpu.epoch,
                                cpu.lengths.data());
    }
    PublishRooms();  // blocks that a truncation has replaced may be written
    Value device = value;
    const Operands operands(this, op, &device, {}, {});
    const auto own = Ints({kId, 1});
    const auto device_edits = Exactly(edits);
    const auto device_copies = Exactly(copies);
    const auto scratch = Scratch(0, 0);
    const std::vector<char> before = rows_.State();
    // Both sides use the same memory, and the device copies.
    EXPECT_OK(cuda::EditSlots(operands.cache(), own.get(), list(device_edits.get(), device_copies.get()),
                              operands.new_epoch(), operands.new_lengths(), copies.empty() ? nullptr : scratch.get(),
                              nullptr));
    std::string text = Finish(op, status, before, value, cpu, operands);
    // Repeating from an older cache is no longer allowed, if only because it shows other slots as occupied.
    if (status.ok() && allow_stale()) history_.clear();
    return text;
  }

  std::string MapSlots(const Value& value, const Named& named) {
    Value cpu = value;
    const auto count = static_cast<std::int64_t>(named.slots.size());
    const auto ok = Exactly<bool>(named.slots.size());
    const Status status =
        pool_->MapSlots("map_slots", Ref(value), named.slots.data(), named.numbers.data(), count, ok.get(), &cpu.epoch);
    Value device = value;
    const Operands operands(this, DeviceOp::kMapSlots, &device, named.slots, named.numbers);
    const auto verdict = Ints({7});
    const std::vector<char> before = rows_.State();
    EXPECT_OK(cuda::CheckMapSlots(operands.cache(), operands.slots(), operands.numbers(), count, operands.new_epoch(),
                                  verdict.get(), nullptr));
    EXPECT_EQ(verdict[0], status.ok() ? 1 : 0);
    PublishRooms();
    return Finish(DeviceOp::kMapSlots, status, before, value, cpu, operands);
  }

  // Compares everything that a result can depend on: `since` of all slots, and what is written of occupied ones.
  void CompareState() {
    Value old = value_;
    old.epoch -= 0x40000000u;
    for (std::int32_t slot = 0; slot < geometry_.max_slots; ++slot) {
      Begin(DeviceOp::kPagedAttention, old, {{slot}, {0, 1}, 1}, 0, /*probe=*/true);
      const std::int32_t length = value_.lengths[slot], room = rows_.slot(slot).room;
      if (length < 0 || length >= room) continue;
      for (std::int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
        Begin(DeviceOp::kPagedAttention, value_, {{slot}, {0, room - length}, room}, layer, /*probe=*/true);
      }
    }
  }

 protected:  // for tests of one more op
  // Operands in device memory. Results are in place or in separate memory, as XLA may choose.
  class Operands {
   public:
    Operands(Twins* twins, DeviceOp op, const Value* value, const std::vector<std::int32_t>& slots,
             const std::vector<std::int32_t>& numbers)
        : buffers_(kId, value->generation, value->epoch, value->lengths),
          slots_(Exactly(slots)),
          numbers_(Exactly(numbers)),
          aliased_(twins->rng_() % 2 == 0),
          lengths_(Exactly<std::int32_t>(value->lengths.size())) {
      cache_ = buffers_.Operands(op, twins->table_, twins->geometry_.spec());
    }
    const cuda::CacheOperands& cache() const { return cache_; }
    const std::int32_t* slots() const { return slots_.get(); }
    const std::int32_t* numbers() const { return numbers_.get(); }
    std::uint32_t* new_epoch() const { return aliased_ ? buffers_.epoch.get() : epoch_.get(); }
    std::int32_t* new_lengths() const { return aliased_ ? buffers_.lengths.get() : lengths_.get(); }

   private:
    CacheBuffers buffers_;
    cuda::CacheOperands cache_;
    std::unique_ptr<std::int32_t[]> slots_, numbers_;
    bool aliased_;
    std::unique_ptr<std::uint32_t[]> epoch_ = Exactly<std::uint32_t>(1);
    std::unique_ptr<std::int32_t[]> lengths_;
  };

  static CacheRef Ref(const Value& value) { return {value.generation, value.epoch, value.lengths.data()}; }
  static BatchRef Ref(const Ragged& batch) {
    return {batch.slots.data(), static_cast<std::int64_t>(batch.slots.size()), batch.offsets.data(), batch.num_tokens};
  }

  // Compares the device's record with the pool's message.
  std::string Compare(DeviceOp op, const Status& status, const std::vector<char>& before) {
    const Fault fault = rows_.TakeFault();
    const Status recorded = fault.set == 0 ? Status() : DescribeFault(fault, kId, geometry_.spec());
    EXPECT_EQ(recorded.message(), status.message());
    EXPECT_EQ(recorded.code(), status.code());
    if (fault.set != 0) {
      EXPECT_EQ(fault.op, static_cast<std::int32_t>(op));
      EXPECT_EQ(rows_.State(), before) << "a failed op changed the table: " << status.message();
      kinds_.insert(std::string(OpName(op)) + " " + std::to_string(fault.kind));
    }
    passed_ += status.ok();
    return status.message();
  }

  std::string Finish(DeviceOp op, const Status& status, const std::vector<char>& before, const Value& value,
                     const Value& cpu, const Operands& operands) {
    const std::string text = Compare(op, status, before);
    EXPECT_EQ(operands.new_epoch()[0], cpu.epoch) << text;
    EXPECT_EQ(rows_.entry().epoch, status.ok() ? cpu.epoch : rows_.entry().epoch);
    for (std::int64_t slot = 0; op != DeviceOp::kMapSlots && slot < geometry_.max_slots; ++slot) {
      EXPECT_EQ(operands.new_lengths()[slot], cpu.lengths[slot]) << OpName(op) << " slot " << slot << " " << text;
      if (status.ok() && cpu.lengths[slot] != value.lengths[slot] && cpu.lengths[slot] >= 0) {
        EXPECT_EQ(rows_.slot(slot).length, cpu.lengths[slot]);
      }
    }
    Next(status.ok(), value, cpu);
    return text;
  }

  void Next(bool ok, const Value& from, const Value& to) {
    if (!ok) return;
    Keep(from);
    value_ = to;
    if (forged_) NewGeneration();  // with the lengths of the pool's record
  }

  // Compares the check's result for the kernels that follow.
  void CheckSequences(const CheckedBatch& checked, const Ragged& batch, const Value& value, std::int32_t layer,
                      bool ok) {
    EXPECT_EQ(checked.ok, ok ? 1 : 0);
    if (!ok) return;
    EXPECT_EQ(checked.layer, layer);
    EXPECT_EQ(checked.num_sequences, static_cast<std::int32_t>(batch.slots.size()));
    EXPECT_TRUE(checked.view.base == pool_->View().base && checked.view.head_dim == geometry_.head_dim);
    for (std::size_t s = 0; s < batch.slots.size(); ++s) {
      const Sequence& sequence = checked.sequences()[s];
      const std::int32_t count = batch.offsets[s + 1] - batch.offsets[s];
      const bool active = batch.slots[s] >= 0 && count > 0;
      EXPECT_EQ(sequence.slot, active ? batch.slots[s] : -1);
      EXPECT_EQ(sequence.query_begin, batch.offsets[s]);
      EXPECT_EQ(sequence.query_length, count);
      EXPECT_TRUE(!active || sequence.position == value.lengths[batch.slots[s]]);
    }
  }

 private:
  const Geometry geometry_;
  const PoolOptions options_;
  std::shared_ptr<Pool> pool_;
  DeviceTable table_;
  PoolRows rows_;
  Rng rng_;
  Value value_;
  std::deque<Value> history_;
  std::set<std::string> kinds_;
  std::int64_t passed_ = 0;
  bool forged_ = false;  // whether a cache with a changed length may have been used
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_CUDA_TWINS_H_
