// The checks and the slot table's ops on the emulated device beside the pool on CPU: the same random programs, right
// and wrong, must get the same answers, in the same words, and leave the same state behind.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "device/fault.h"
#include "tests/check.h"
#include "tests/cuda_util.h"
#include "tests/pool_util.h"

namespace kvpage::testing {
namespace {

using Rng = std::mt19937_64;

int Pick(Rng& rng, int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Value {  // of a cache
  std::int32_t line = 0;
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;
};

struct Named {  // slots and a number for each
  std::vector<std::int32_t> slots, numbers;
};

// A batch, or several mistakes in one.
struct Ragged {
  std::vector<std::int32_t> slots, offsets;
  std::int64_t num_tokens = 0;
};

// A pool and the same pool on the device. Every op runs on both; texts are what went wrong ("" for nothing).
class Twins {
 public:
  Twins(const Geometry& geometry, std::int64_t blocks, bool allow_stale, std::uint64_t seed)
      : geometry_(geometry),
        options_{allow_stale, false},
        pool_(MakePool(geometry, blocks, options_)),
        rows_(table_.Add(geometry.spec(), pool_->View(), kId)),
        rng_(seed) {
    pool_->set_id(kId);
    rows_.entry().allow_stale = allow_stale;
    NewLine();
  }

  static constexpr std::int32_t kId = 700;  // its entry is not the first

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

  // As pool.cache() does on a device.
  void NewLine() {
    Pool::Line line;
    CHECK_OK(pool_->NewLine(&line));
    value_ = {line.line, line.epoch, line.lengths};
    DevicePool& entry = rows_.entry();
    entry.line = line.line;
    CHECK_EQ(entry.epoch + 1, line.epoch);
    entry.epoch = line.epoch;
    for (std::int64_t slot = 0; slot < geometry_.max_slots; ++slot) {
      DeviceSlot& row = rows_.slot(slot);
      row.since = line.epoch;
      CHECK(line.lengths[slot] < 0 || row.length == line.lengths[slot]) << "slot" << slot << row.length;
      for (std::int64_t layer = 0; layer < geometry_.num_layers; ++layer) {
        rows_.written(slot, layer) = std::min(rows_.written(slot, layer), row.length);
      }
    }
    history_.clear();
  }

  void PublishRooms() {
    for (const SlotRow& row : pool_->Rows()) {
      if (row.state != SlotState::kOccupied) continue;
      const std::int64_t mapped = geometry_.BlocksFor(row.reserved) * geometry_.block_tokens;
      rows_.slot(row.slot).room = static_cast<std::int32_t>(std::min(mapped, geometry_.max_seq_len));
    }
  }

  // The newest cache, or one that is not.
  Value PickValue() {
    Value value = value_;
    const int kind = Pick(rng_, 0, 39);
    if (kind < 4 && !history_.empty()) value = history_[rng_() % history_.size()];
    if (kind == 4) value.epoch += static_cast<std::uint32_t>(Pick(rng_, 1, 1000));
    if (kind == 5) value.line += Pick(rng_, 0, 1) * 2 - 1;
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
      Step step;
      status = pool_->Begin(OpName(op), Ref(value), Ref(batch), layer, append, &step);
      if (append && status.ok()) cpu.epoch = step.epoch();
    }
    Value device = value;
    const Operands operands(this, op, &device, batch.slots, batch.offsets);
    const auto at = Ints({layer});
    const auto scratch = Scratch(static_cast<std::int64_t>(batch.slots.size()));
    const cuda::BatchOperands batch_operands = {operands.slots(), operands.numbers(),
                                                static_cast<std::int64_t>(batch.slots.size()), batch.num_tokens};
    const std::vector<char> before = rows_.State();
    if (append) {
      // Only the check: no token's keys and values are written when there are none to take them from.
      const auto row = static_cast<std::size_t>(geometry_.num_kv_heads * geometry_.head_dim) * sizeof(float);
      const auto k = Exactly<char>(static_cast<std::size_t>(std::max<std::int64_t>(batch.num_tokens, 0)) * row);
      CHECK_OK(
          cuda::AppendKV(operands.cache(), batch_operands,
                         {at.get(), k.get(), k.get(), DType::kF32, static_cast<std::int32_t>(geometry_.num_kv_heads),
                          static_cast<std::int32_t>(geometry_.head_dim)},
                         operands.new_epoch(), scratch.get(), nullptr));
    } else {
      CHECK_OK(
          cuda::GatherContext(operands.cache(), batch_operands, at.get(), 0, nullptr, nullptr, scratch.get(), nullptr));
    }
    const std::string text = Compare(op, status, before);
    CHECK(!append || operands.new_epoch()[0] == cpu.epoch) << text;
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
    CHECK_OK(cuda::Advance(operands.cache(), {operands.slots(), operands.numbers(), count, -1}, operands.new_epoch(),
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
    CHECK_OK(cuda::SetLengths(operands.cache(), operands.slots(), operands.numbers(), count, operands.new_epoch(),
                              operands.new_lengths(), nullptr));
    return Finish(DeviceOp::kSetLengths, status, before, value, cpu, operands);
  }

  std::string ChangeOwner(const Value& value, const std::vector<std::int32_t>& slots, bool occupy) {
    Value cpu = value;
    const DeviceOp op = occupy ? DeviceOp::kAcquire : DeviceOp::kRelease;
    const auto count = static_cast<std::int64_t>(slots.size());
    const Status status =
        occupy ? pool_->Occupy("acquire", Ref(value), slots.data(), count, &cpu.epoch, cpu.lengths.data())
               : pool_->Vacate("release", Ref(value), slots.data(), count, &cpu.epoch, cpu.lengths.data());
    Value device = value;
    const Operands operands(this, op, &device, slots, {});
    const auto own = Ints({kId, 1});
    const std::vector<char> before = rows_.State();
    CHECK_OK(cuda::ChangeOwner(operands.cache(), own.get(), operands.slots(), count, occupy, operands.new_epoch(),
                               operands.new_lengths(), nullptr));
    std::string text = Finish(op, status, before, value, cpu, operands);
    // Repeating from a cache older than this is no longer allowed, if only because it shows other slots as taken.
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
    CHECK_OK(cuda::CheckMapSlots(operands.cache(), operands.slots(), operands.numbers(), count, operands.new_epoch(),
                                 verdict.get(), nullptr));
    CHECK_EQ(verdict[0], status.ok() ? 1 : 0);
    PublishRooms();
    return Finish(DeviceOp::kMapSlots, status, before, value, cpu, operands);
  }

  // Asks both for every number that an answer can tell: since of all slots, what is written of the occupied ones.
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

 private:
  // Operands in device memory. Results lie in the operands' own memory or apart, as XLA may have it.
  class Operands {
   public:
    Operands(Twins* twins, DeviceOp op, const Value* value, const std::vector<std::int32_t>& slots,
             const std::vector<std::int32_t>& numbers)
        : buffers_(kId, value->line, value->epoch, value->lengths),
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

  static CacheRef Ref(const Value& value) { return {value.line, value.epoch, value.lengths.data()}; }
  static BatchRef Ref(const Ragged& batch) {
    return {batch.slots.data(), static_cast<std::int64_t>(batch.slots.size()), batch.offsets.data(), batch.num_tokens};
  }

  // What the device recorded against what the pool said.
  std::string Compare(DeviceOp op, const Status& status, const std::vector<char>& before) {
    const Fault fault = rows_.TakeFault();
    const Status recorded = fault.set == 0 ? Status() : DescribeFault(fault, kId, geometry_.spec());
    CHECK_EQ(recorded.message(), status.message());
    CHECK(recorded.code() == status.code());
    if (fault.set != 0) {
      CHECK_EQ(fault.op, static_cast<std::int32_t>(op));
      CHECK(rows_.State() == before) << "a failed op changed the table:" << status.message();
      kinds_.insert(std::string(OpName(op)) + " " + std::to_string(fault.kind));
    }
    passed_ += status.ok();
    return status.message();
  }

  std::string Finish(DeviceOp op, const Status& status, const std::vector<char>& before, const Value& value,
                     const Value& cpu, const Operands& operands) {
    const std::string text = Compare(op, status, before);
    CHECK_EQ(operands.new_epoch()[0], cpu.epoch) << text;
    CHECK_EQ(rows_.entry().epoch, status.ok() ? cpu.epoch : rows_.entry().epoch);
    for (std::int64_t slot = 0; op != DeviceOp::kMapSlots && slot < geometry_.max_slots; ++slot) {
      CHECK_EQ(operands.new_lengths()[slot], cpu.lengths[slot]) << OpName(op) << "slot" << slot << text;
      if (status.ok() && cpu.lengths[slot] != value.lengths[slot] && cpu.lengths[slot] >= 0) {
        CHECK_EQ(rows_.slot(slot).length, cpu.lengths[slot]);
      }
    }
    Next(status.ok(), value, cpu);
    return text;
  }

  void Next(bool ok, const Value& from, const Value& to) {
    if (!ok) return;
    Keep(from);
    value_ = to;
  }

  // What the check leaves for the kernels behind it.
  void CheckSequences(const CheckedBatch& checked, const Ragged& batch, const Value& value, std::int32_t layer,
                      bool ok) {
    CHECK_EQ(checked.ok, ok ? 1 : 0);
    if (!ok) return;
    CHECK_EQ(checked.layer, layer);
    CHECK_EQ(checked.num_sequences, static_cast<std::int32_t>(batch.slots.size()));
    CHECK(checked.view.base == pool_->View().base && checked.view.head_dim == geometry_.head_dim);
    for (std::size_t s = 0; s < batch.slots.size(); ++s) {
      const Sequence& sequence = checked.sequences()[s];
      const std::int32_t count = batch.offsets[s + 1] - batch.offsets[s];
      const bool active = batch.slots[s] >= 0 && count > 0;
      CHECK_EQ(sequence.slot, active ? batch.slots[s] : -1);
      CHECK_EQ(sequence.query_begin, batch.offsets[s]);
      CHECK_EQ(sequence.query_length, count);
      CHECK(!active || sequence.position == value.lengths[batch.slots[s]]);
    }
  }

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
};

// ---- random programs ----

std::int32_t AnySlot(Twins& t) {
  const auto slots = static_cast<int>(t.geometry().max_slots);
  const int kind = Pick(t.rng(), 0, 60);
  if (kind == 0) return slots;
  if (kind == 1) return -2;
  if (kind == 2) return 1 << 30;
  if (kind < 10) return -1;
  return Pick(t.rng(), 0, slots - 1);
}

std::vector<std::int32_t> Occupied(Twins& t) {
  std::vector<std::int32_t> slots;
  for (std::int32_t slot = 0; slot < t.geometry().max_slots; ++slot) {
    if (t.value().lengths[slot] >= 0) slots.push_back(slot);
  }
  std::shuffle(slots.begin(), slots.end(), t.rng());
  return slots;
}

// Mostly a batch that can run: distinct occupied slots, some padding.
Ragged RandomBatch(Twins& t, int at_most) {
  Rng& rng = t.rng();
  Ragged batch;
  const bool wild = Pick(rng, 0, 3) == 0;
  std::vector<std::int32_t> slots = Occupied(t);
  const int count = wild ? Pick(rng, 0, at_most) : Pick(rng, 0, static_cast<int>(slots.size()));
  batch.offsets.push_back(0);
  for (int s = 0; s < count; ++s) {
    batch.slots.push_back(wild ? AnySlot(t) : Pick(rng, 0, 9) == 0 ? -1 : slots[s]);
    batch.offsets.push_back(batch.offsets.back() + (Pick(rng, 0, 15) == 0 ? Pick(rng, 60, 140) : Pick(rng, 0, 9)));
  }
  batch.num_tokens = batch.offsets.back() + Pick(rng, 0, 3);
  if (!wild) return batch;
  for (int mistakes = Pick(rng, 0, 2); mistakes > 0; --mistakes) {
    const int kind = Pick(rng, 0, 3);
    if (kind == 0) batch.offsets[rng() % batch.offsets.size()] += Pick(rng, -3, 3);
    if (kind == 1) batch.offsets[0] = Pick(rng, -1, 1);
    if (kind == 2) batch.num_tokens = std::max(batch.offsets.back() - Pick(rng, 0, 2), 0);
    if (kind == 3 && count > 1) batch.slots[rng() % count] = batch.slots[rng() % count];
  }
  return batch;
}

Named RandomNamed(Twins& t, int most) {
  Rng& rng = t.rng();
  Named named;
  const bool wild = Pick(rng, 0, 3) == 0;
  const std::vector<std::int32_t> slots = Occupied(t);
  const int count = wild ? Pick(rng, 0, 5) : Pick(rng, 0, std::min<int>(3, static_cast<int>(slots.size())));
  for (int i = 0; i < count; ++i) {
    const std::int32_t slot = wild ? AnySlot(t) : slots[i];
    named.slots.push_back(slot);
    const std::int32_t length = t.Exists(slot) ? std::max(t.value().lengths[slot], 0) : 0;
    named.numbers.push_back(wild       ? (Pick(rng, 0, 2) - 1) * (most + 1)
                            : most > 0 ? Pick(rng, 0, most)
                                       : Pick(rng, 0, length));
  }
  return named;
}

void AcquireSome(Twins& t) {
  std::vector<std::int64_t> tokens(Pick(t.rng(), 1, 2));
  for (std::int64_t& n : tokens) n = Pick(t.rng(), 0, 70);
  const Claim claim = t.pool().Acquire(tokens);
  if (!claim.status.ok()) return;
  t.PublishRooms();
  for (const std::int32_t slot : claim.slots) t.rows().vacated(slot) = 0;
  std::vector<std::int32_t> slots = claim.slots;
  // With one that is taken, or does not exist; that one is free in the pool but was not acquired only the host knows.
  const std::int32_t other = AnySlot(t);
  const bool known = !t.Exists(other) || t.StateOf(other) != SlotState::kFree;
  if (known && Pick(t.rng(), 0, 4) == 0) slots.insert(slots.begin() + Pick(t.rng(), 0, 1), other);
  if (!t.ChangeOwner(t.PickValue(), slots, true).empty()) {
    t.pool().UndoAcquire(claim.slots);
  }
}

void ReleaseSome(Twins& t) {
  std::vector<std::int32_t> slots = Occupied(t);
  slots.resize(std::min<std::size_t>(slots.size(), Pick(t.rng(), 0, 2)));
  if (!t.pool().StartRelease(slots).ok()) return;
  std::vector<std::int32_t> named = slots;
  const std::int32_t other = AnySlot(t);
  // Not one that the host has not released: only the host knows that.
  if (!t.Exists(other) || (!t.allow_stale() && t.StateOf(other) == SlotState::kFree)) named.push_back(other);
  if (!slots.empty() && Pick(t.rng(), 0, 9) == 0) named.push_back(slots[0]);
  std::shuffle(named.begin(), named.end(), t.rng());
  if (!t.ChangeOwner(t.PickValue(), named, false).empty()) {
    t.pool().UndoRelease(slots);
    return;
  }
  for (const std::int32_t slot : slots) CHECK_EQ(t.rows().vacated(slot), 1u);
}

void RandomOp(Twins& t) {
  Rng& rng = t.rng();
  const auto layers = static_cast<int>(t.geometry().num_layers);
  const int layer = Pick(rng, 0, 24) == 0 ? Pick(rng, -1, layers) : Pick(rng, 0, layers - 1);
  switch (Pick(rng, 0, 11)) {
    case 0:
    case 1:
      return AcquireSome(t);
    case 2:
      return ReleaseSome(t);
    case 3: {
      const std::vector<std::int32_t> slots = Occupied(t);
      if (slots.empty()) return;
      static_cast<void>(t.pool().Extend({slots[0]}, {Pick(rng, 1, 128)}));
      return t.PublishRooms();
    }
    case 4:
      t.Begin(DeviceOp::kAppendKV, t.PickValue(), RandomBatch(t, 6), layer);
      return;
    case 5:
      t.Begin(DeviceOp::kPagedAttention, t.PickValue(), RandomBatch(t, 6), layer);
      return;
    case 6: {  // a whole step, of which one part may be missing
      const Ragged batch = RandomBatch(t, 6);
      const int left_out = Pick(rng, 0, 5 * layers);
      for (int l = 0; l < layers; ++l) {
        if (l != left_out) t.Begin(DeviceOp::kAppendKV, t.value(), batch, l);
      }
      t.Advance(t.PickValue(), batch);
      return;
    }
    case 7:
      t.Advance(t.PickValue(), RandomBatch(t, 6));
      return;
    case 8:
      t.SetLengths(t.PickValue(), RandomNamed(t, 0));
      return;
    case 9:
      t.MapSlots(t.PickValue(), RandomNamed(t, static_cast<int>(t.geometry().max_seq_len)));
      return;
    case 10:
      if (Pick(rng, 0, 4) == 0) t.NewLine();
      return;
    default: {  // reads what was written
      const std::vector<std::int32_t> slots = Occupied(t);
      if (slots.empty()) return;
      t.Begin(DeviceOp::kPagedAttention, t.PickValue(), {{slots[0]}, {0, 1}, 1}, layer);
      return;
    }
  }
}

TEST(RandomProgramsGetTheSameAnswers) {
  std::set<std::string> kinds;
  for (int round = 0; round < 12; ++round) {
    emulation::device().seed = static_cast<std::uint64_t>(round) % 4;
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    Twins twins(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, round % 3 == 0,
                static_cast<std::uint64_t>(round));
    const int before = Failures();
    for (int i = 0; i < 500 && Failures() == before; ++i) {
      RandomOp(twins);
      if (i % 4 == 0) twins.CompareState();
    }
    CHECK(Failures() == before) << "round" << round;
    CHECK(twins.num_passed() > 150) << twins.num_passed();
    kinds.insert(twins.kinds().begin(), twins.kinds().end());
  }
  emulation::device().seed = 0;
  // Every fault that the pool's own state can bring about has been met.
  const auto met = [&](DeviceOp op, FaultKind kind) {
    CHECK(kinds.count(std::string(OpName(op)) + " " + std::to_string(static_cast<int>(kind))) == 1)
        << OpName(op) << static_cast<int>(kind);
  };
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention, DeviceOp::kAdvance, DeviceOp::kSetLengths,
                            DeviceOp::kMapSlots, DeviceOp::kAcquire, DeviceOp::kRelease}) {
    for (const FaultKind kind : {FaultKind::kLine, FaultKind::kEpoch, FaultKind::kSlotRange, FaultKind::kSlotTwice}) {
      met(op, kind);
    }
    if (op != DeviceOp::kAcquire) met(op, FaultKind::kSlotFree);
  }
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention, DeviceOp::kAdvance}) {
    met(op, FaultKind::kOffsetsStart);
    met(op, FaultKind::kOffsetsOrder);
  }
  met(DeviceOp::kPagedAttention, FaultKind::kSlotEpoch);
  for (const DeviceOp op : {DeviceOp::kAppendKV, DeviceOp::kPagedAttention}) {
    met(op, FaultKind::kOffsetsEnd);
    met(op, FaultKind::kLayer);
    met(op, FaultKind::kMaxSeqLen);
    met(op, FaultKind::kUnmapped);
  }
  met(DeviceOp::kPagedAttention, FaultKind::kUnwritten);
  met(DeviceOp::kAdvance, FaultKind::kUnwritten);
  met(DeviceOp::kSetLengths, FaultKind::kRaise);
  met(DeviceOp::kMapSlots, FaultKind::kMaxSeqLen);
  met(DeviceOp::kAcquire, FaultKind::kSlotTaken);
}

// A cache of the newest epoch may show a released slot as taken, when it went on from an older one.
TEST(ReleasedSlotsHaveNoRoom) {
  Twins twins(SmallGeometry(), 20, /*allow_stale=*/true, 1);
  const Claim claim = twins.pool().Acquire({40, 40});
  CHECK_OK(claim.status);
  twins.PublishRooms();
  CHECK_EQ(twins.ChangeOwner(twins.value(), claim.slots, true), "");
  const Value before = twins.value();
  const std::int32_t gone = claim.slots[0], kept = claim.slots[1];
  CHECK_OK(twins.pool().StartRelease({gone}));
  CHECK_EQ(twins.ChangeOwner(twins.value(), {gone}, false), "");
  // The older cache itself is too old for that slot, in every op.
  CHECK(twins.Begin(DeviceOp::kAppendKV, before, {{gone}, {0, 5}, 5}, 0).find("stale") != std::string::npos);
  CHECK(twins.Begin(DeviceOp::kPagedAttention, before, {{gone}, {0, 5}, 5}, 0).find("stale") != std::string::npos);
  CHECK(twins.Advance(before, {{kept, gone}, {0, 0, 0}, 0}).find("stale") != std::string::npos);
  CHECK(twins.SetLengths(before, {{kept, gone}, {0, 0}}).find("stale") != std::string::npos);
  CHECK(twins.MapSlots(before, {{gone}, {50}}).find("stale") != std::string::npos);
  CHECK_EQ(twins.Begin(DeviceOp::kAppendKV, before, {{kept}, {0, 5}, 5}, 0), "");
  CHECK_EQ(twins.value().lengths[gone], 0);
  const std::string text = twins.Begin(DeviceOp::kAppendKV, twins.value(), {{gone}, {0, 5}, 5}, 0);
  CHECK(text.find("5 tokens wanted, 0 mapped") != std::string::npos) << text;
}

// More sequences than threads; with more slots than marks in shared memory too.
TEST(LargeBatches) {
  for (const int slots : {700, 9000}) {
    Geometry geometry;
    CHECK_OK(Geometry::Make({2, 1, 16, slots, 32, 0, 0, 16}, 4096, &geometry));
    Twins twins(geometry, 1400, false, 3);
    emulation::device().seed = 5;
    const Claim claim = twins.pool().Acquire(std::vector<std::int64_t>(650, 20));
    CHECK_OK(claim.status);
    twins.PublishRooms();
    CHECK_EQ(twins.ChangeOwner(twins.value(), claim.slots, true), "");
    Ragged batch;
    batch.offsets.push_back(0);
    for (int s = 0; s < 600; ++s) {
      batch.slots.push_back(claim.slots[649 - s]);
      batch.offsets.push_back(batch.offsets.back() + s % 4);
    }
    batch.num_tokens = batch.offsets.back();
    for (int layer = 0; layer < 2; ++layer) {
      CHECK_EQ(twins.Begin(DeviceOp::kAppendKV, twins.value(), batch, layer), "");
    }
    CHECK_EQ(twins.Advance(twins.value(), batch), "");
    for (int i = 0; i < 30; ++i) {  // several mistakes in one: the first is reported
      Ragged wrong = batch;
      for (int mistakes = Pick(twins.rng(), 1, 4); mistakes > 0; --mistakes) {
        wrong.slots[twins.rng()() % 600] = Pick(twins.rng(), 0, 1) == 0 ? wrong.slots[twins.rng()() % 600] : slots + 5;
        if (Pick(twins.rng(), 0, 3) == 0) wrong.offsets[twins.rng()() % 600] += 1;
      }
      twins.Begin(DeviceOp::kAppendKV, twins.value(), wrong, 0);
      twins.Advance(twins.value(), wrong);
    }
    CHECK_EQ(twins.ChangeOwner(twins.value(), claim.slots, true).empty(), false);
    CHECK_OK(twins.pool().StartRelease(claim.slots));
    CHECK_EQ(twins.ChangeOwner(twins.value(), claim.slots, false), "");
    CHECK_EQ(twins.rows().vacated(claim.slots[649]), 1u);
  }
  emulation::device().seed = 0;
}

// ---- what only a device has ----

struct Head {
  Geometry geometry = SmallGeometry();
  DeviceTable table;
  PoolRows rows = table.Add(geometry.spec(), geometry.View(nullptr), 5);
  std::vector<std::int32_t> lengths = std::vector<std::int32_t>(kSlots, -1);

  // An acquire of slot 0 by a program of pool `id`; what was recorded in the pool's record, or in nobody's.
  Fault Acquire(std::int32_t id, const SpecInts& spec, std::int32_t own) {
    const CacheBuffers buffers(id, 0, rows.entry().epoch, lengths);
    const auto slots = Ints({0}), handle = Ints({own, 0});
    CHECK_OK(cuda::ChangeOwner(buffers.Operands(DeviceOp::kAcquire, table, spec), handle.get(), slots.get(), 1, true,
                               buffers.epoch.get(), buffers.lengths.get(), nullptr));
    const Fault fault = rows.TakeFault();
    if (fault.set != 0) return fault;
    return PoolRows::Take(&table.entries[kMaxDevicePools], table.no_pool.get());
  }
  FaultKind Kind(std::int32_t id, std::int32_t own) {
    return static_cast<FaultKind>(Acquire(id, geometry.spec(), own).kind);
  }
};

TEST(PoolsAreFoundByLookingOn) {
  Head head;
  CHECK(head.Kind(5, 5) == FaultKind::kNone);
  for (const std::int32_t id : {6, 4, 0, -1, -5, 5 + kMaxDevicePools, 1 << 30}) {
    const Fault fault = head.Acquire(id, head.geometry.spec(), id);
    CHECK(static_cast<FaultKind>(fault.kind) == FaultKind::kNoPool) << id;
    CHECK_EQ(fault.have, id);
  }
  // The entry where the search begins is taken by another pool, or was left by one; it goes around the table's end.
  head.rows.entry().id = kLeftEntry;
  PoolRows late(head.geometry.spec(), head.geometry.View(nullptr), 2 * kMaxDevicePools - 1, &head.table.entries[0]);
  late.entry().epoch = head.rows.entry().epoch;
  head.table.entries[kMaxDevicePools - 1].id = kMaxDevicePools - 1;
  CHECK(head.Kind(2 * kMaxDevicePools - 1, 2 * kMaxDevicePools - 1) == FaultKind::kNone);
  CHECK_EQ(late.entry().epoch, head.rows.entry().epoch + 1);
  for (int i = 0; i < kMaxDevicePools; ++i)
    head.table.entries[i].id = kLeftEntry;  // none is empty: it ends all the same
  CHECK(head.Kind(5, 5) == FaultKind::kNoPool);
}

TEST(WrongPoolsAndPrograms) {
  Head head;
  for (int i = 0; i < 8; ++i) {
    SpecInts spec = head.geometry.spec();
    if (i != 3) spec[i] += 1;  // more slots than the cache value has: the lengths would be too short
    if (i == 3) spec[i] -= 1;
    const Fault fault = head.Acquire(5, spec, 5);
    CHECK(static_cast<FaultKind>(fault.kind) == FaultKind::kSpec);
    CHECK_EQ(fault.index, i);
    CHECK_EQ(fault.wanted, spec[i]);
    CHECK_EQ(fault.have, head.geometry.spec()[i]);
  }
  const Fault foreign = head.Acquire(5, head.geometry.spec(), 9);
  CHECK(static_cast<FaultKind>(foreign.kind) == FaultKind::kForeignCache);
  CHECK_EQ(foreign.wanted, 5);
  CHECK_EQ(foreign.have, 9);
  head.rows.entry().open = 0;
  CHECK(head.Kind(5, 5) == FaultKind::kClosed);
}

TEST(TheFirstFaultStays) {
  Head head;
  const CacheBuffers stale(5, 0, 3, head.lengths), line(5, 1, 0, head.lengths);
  const auto slots = Ints({0}), values = Ints({0});
  const auto epoch = Exactly<std::uint32_t>(1);
  const auto lengths = Exactly<std::int32_t>(kSlots);
  for (const CacheBuffers* buffers : {&stale, &line}) {
    CHECK_OK(cuda::SetLengths(buffers->Operands(DeviceOp::kSetLengths, head.table, head.geometry.spec()), slots.get(),
                              values.get(), 1, epoch.get(), lengths.get(), nullptr));
  }
  CHECK_EQ(head.rows.entry().faulted, 1u);
  const Fault fault = head.rows.TakeFault();
  CHECK(static_cast<FaultKind>(fault.kind) == FaultKind::kEpoch);
  CHECK_EQ(fault.wanted, 3);
  CHECK_EQ(fault.set, 1u);
}

TEST(OldMarksAreDraggedAlong) {
  Head head;
  head.rows.entry().epoch = 0x3fffffffu;
  for (int slot = 0; slot < kSlots; ++slot) head.rows.slot(slot).since = slot == 1 ? 0xffffff00u : 0x100u + slot;
  head.lengths = {0, -1, -1, -1};
  const CacheBuffers buffers(5, 0, 0x3fffffffu, head.lengths);
  const auto slots = Ints({2});
  CHECK_OK(cuda::ChangeOwner(buffers.Operands(DeviceOp::kAcquire, head.table, head.geometry.spec()),
                             buffers.handle.get(), slots.get(), 1, true, buffers.epoch.get(), buffers.lengths.get(),
                             nullptr));
  CHECK_EQ(head.rows.TakeFault().kind, 0);
  CHECK_EQ(buffers.epoch[0], 0x40000000u);
  CHECK_EQ(head.rows.slot(0).since, 0x100u);
  CHECK_EQ(head.rows.slot(1).since, 0u);  // from before the wrap
  CHECK_EQ(head.rows.slot(2).since, 0x40000000u);
}

}  // namespace
}  // namespace kvpage::testing

int main(int argc, char** argv) { return kvpage::testing::RunAll(argc, argv); }
