// Programs on several devices with the CUDA kernels (on the emulated device): each reads the mirror and the memory of
// its own device (on the fake driver), and all devices map the same memory.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "tests/cuda_util.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kDim = 64, kQHeads = 2;

Geometry OneHead() {
  Geometry geometry;
  if (!Geometry::Make({kLayers, 1, kDim, kSlots, 128, 0, 0, 16}, 16384, &geometry).ok()) std::abort();
  return geometry;
}

// One device's part of a model whose heads are split: it has the keys and values of one head.
class Part {
 public:
  Part(Machine* machine, int device, std::int32_t id) : machine_(machine), device_(device), random_(device + 1) {
    EXPECT_OK(machine->Open(id, OneHead(), 10, &pool_, device));
    handle_[0] = id;
  }
  const std::shared_ptr<Pool>& pool() const { return pool_; }
  std::int32_t length(std::int32_t slot) const { return lengths_[slot]; }
  JointMaps::Start Restart() {
    Pool::Generation generation;
    EXPECT_OK(pool_->NewGeneration(&generation));
    handle_[1] = generation.generation;
    epoch_ = generation.epoch;
    lengths_ = generation.lengths;
    return {generation.generation, generation.epoch};
  }
  void Edit(SlotOpcode opcode, std::int32_t slot) {
    const SlotEdit edit = {static_cast<std::int32_t>(opcode), slot, 0};
    const DeviceOp op = opcode == SlotOpcode::kOccupy ? DeviceOp::kAcquire : DeviceOp::kRelease;
    EXPECT_OK(cuda::EditSlots(Cache(op), handle_, {&edit, 1, nullptr, 0}, &epoch_, lengths_.data(), nullptr, nullptr));
  }
  // Does what the map_slots handler does: the device checks, the host maps.
  bool Map(std::int32_t slot, std::int32_t tokens) {
    std::int32_t verdict = -1;
    EXPECT_OK(cuda::CheckMapSlots(Cache(DeviceOp::kMapSlots), &slot, &tokens, 1, &epoch_, &verdict, nullptr));
    if (verdict != 1) {
      pool_->PassOverMap(handle_[1]);
      return false;
    }
    bool ok = false;
    EXPECT_OK(pool_->MapChecked("map_slots", handle_[1], &slot, &tokens, 1, &ok));
    return ok;
  }
  // Appends random tokens in every layer, and attends from the last of them in layer 1: [kQHeads, kDim].
  std::vector<float> Step(std::int32_t slot, std::int32_t count) {
    const std::int32_t offsets[] = {0, count};
    cuda::BatchOperands batch = {&slot, offsets, 1, count};
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const std::vector<float> k = Random(count), v = Random(count);
      if (layer == 1) {
        keys_.insert(keys_.end(), k.begin(), k.end());
        values_.insert(values_.end(), v.begin(), v.end());
      }
      const cuda::AppendOperands append = {&layer, k.data(), v.data(), DType::kF32, 1, kDim};
      EXPECT_OK(cuda::AppendKV(Cache(DeviceOp::kAppendKV), batch, append, &epoch_, scratch_, nullptr));
    }
    std::vector<float> all = Attend(batch, count);
    batch.num_tokens = -1;
    EXPECT_OK(cuda::Advance(Cache(DeviceOp::kAdvance), batch, &epoch_, lengths_.data(), nullptr));
    return {all.end() - kQHeads * kDim, all.end()};
  }
  // Returns the result of plain attention over the appended keys and values.
  std::vector<float> Wanted() const {
    std::vector<float> wanted(kQHeads * kDim, 0.0f);
    const std::size_t tokens = keys_.size() / kDim;
    for (std::int32_t head = 0; head < kQHeads; ++head) {
      const float* const q = &query_[query_.size() - (kQHeads - head) * kDim];
      std::vector<double> weights;
      double sum = 0;
      for (std::size_t t = 0; t < tokens; ++t) {
        double score = 0;
        for (std::int32_t d = 0; d < kDim; ++d) score += double{q[d]} * keys_[t * kDim + d];
        sum += weights.emplace_back(std::exp(score));
      }
      for (std::size_t t = 0; t < tokens; ++t) {
        for (std::int32_t d = 0; d < kDim; ++d) {
          wanted[head * kDim + d] += static_cast<float>(weights[t] / sum * values_[t * kDim + d]);
        }
      }
    }
    return wanted;
  }

 private:
  cuda::CacheOperands Cache(DeviceOp op) {
    cuda::CacheOperands cache;
    cache.op = op;
    cache.pools = machine_->device(device_)->table();
    cache.handle = handle_;
    cache.epoch = &epoch_;
    cache.lengths = lengths_.data();
    cache.spec = pool_->geometry().spec();
    return cache;
  }
  std::vector<float> Random(std::int32_t tokens) {
    std::normal_distribution<float> normal(0, 0.3f);
    std::vector<float> rows(static_cast<std::size_t>(tokens) * kDim);
    for (float& x : rows) x = normal(random_);
    return rows;
  }
  std::vector<float> Attend(const cuda::BatchOperands& batch, std::int32_t count) {
    query_ = Random(count * kQHeads);
    std::vector<float> out(query_.size(), NAN);
    const std::int32_t layer = 1;
    cuda::AttentionOperands attention;
    attention.layer = &layer;
    attention.q = query_.data();
    attention.out = out.data();
    attention.num_q_heads = kQHeads;
    attention.num_kv_heads = 1;
    attention.head_dim = kDim;
    attention.max_context = 128;
    attention.max_slots = kSlots;
    const auto scratch = Exactly<char>(cuda::AttentionBytes(attention, 1, count));
    const auto plan = Exactly<char>(cuda::PlanBytes(1));
    EXPECT_OK(cuda::PlanAttention(Cache(DeviceOp::kPagedAttention), batch, attention, plan.get(), nullptr));
    EXPECT_OK(cuda::Attend(Cache(DeviceOp::kPagedAttention), batch, attention, nullptr, plan.get(), nullptr,
                           scratch.get(), nullptr));
    return out;
  }

  Machine* const machine_;
  const int device_;
  std::mt19937 random_;
  std::shared_ptr<Pool> pool_;
  std::int32_t handle_[2] = {0, 0};
  std::uint32_t epoch_ = 0;
  std::vector<std::int32_t> lengths_;
  std::vector<float> keys_, values_, query_;
  alignas(256) char scratch_[4096];
};

void ExpectNear(const std::vector<float>& got, const std::vector<float>& wanted) {
  for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(got[i], wanted[i], 1e-5f) << i;
}

class JointKernelsTest : public ::testing::TestWithParam<int> {};

TEST_P(JointKernelsTest, EachDeviceReadsItsOwnMirror) {
  const int devices = GetParam();
  Machine machine(devices);
  std::vector<std::unique_ptr<Part>> parts;
  std::vector<std::shared_ptr<Pool>> pools;
  // Ids whose search starts at the same table entry: each device has its own table.
  for (int i = 0; i < devices; ++i) {
    parts.push_back(std::make_unique<Part>(&machine, i, 9 + i * kMaxDevicePools));
    pools.push_back(parts[i]->pool());
  }
  std::shared_ptr<JointMaps> joint;
  EXPECT_OK(Pool::Join(pools, &joint));
  std::vector<JointMaps::Start> starts;
  for (const auto& part : parts) starts.push_back(part->Restart());
  joint->Begin(starts);
  std::int32_t slot = -1;
  for (const auto& part : parts) {
    slot = part->pool()->Acquire({4}).slots[0];
    part->Edit(SlotOpcode::kOccupy, slot);
    const std::vector<float> got = part->Step(slot, 4);
    ExpectNear(got, part->Wanted());
  }
  // Device by device, with a different one first each time: the decode step after a prefill.
  std::vector<std::vector<float>> last(parts.size());
  const std::vector<std::int32_t> steps = {30, 1, 1, 40};
  for (std::size_t round = 0; round < steps.size(); ++round) {
    for (std::size_t turn = 0; turn < parts.size(); ++turn) {
      const std::size_t i = (round + turn) % parts.size();
      Part& part = *parts[i];
      EXPECT_TRUE(part.Map(slot, part.length(slot) + steps[round]));
      last[i] = part.Step(slot, steps[round]);
      ExpectNear(last[i], part.Wanted());
    }
  }
  EXPECT_NE(last[0], last[1]);
  BlockReferences first, other;
  EXPECT_OK(pools[0]->BlockMap(slot, &first));
  for (const auto& pool : pools) {
    EXPECT_OK(pool->BlockMap(slot, &other));
    EXPECT_EQ(other, first);
    EXPECT_OK(pool->Audit());
    EXPECT_OK(pool->TakeFault());
  }
  const JointMaps::Numbers numbers = joint->numbers();
  EXPECT_EQ(numbers.decisions, 4);
  EXPECT_EQ(numbers.fetched, 4 * (devices - 1));
  EXPECT_EQ(numbers.pending, 0);

  // Device 1 refuses a call; from the next call on, all are in step again.
  Part stale = *parts[1];
  EXPECT_TRUE(parts[0]->Map(slot, 80));
  stale.Edit(SlotOpcode::kOccupy, slot);  // refused, and a fault is recorded
  EXPECT_FALSE(pools[1]->TakeFault().ok());
  stale.Restart();
  EXPECT_FALSE(parts[1]->Map(slot, 80));  // a stale generation
  EXPECT_TRUE(Mentions(pools[1]->TakeFault(), "generation")) << "the fault of a program is its device's";
  for (const auto& pool : pools) EXPECT_OK(pool->TakeFault());
  starts.clear();
  for (const auto& part : parts) starts.push_back(part->Restart());
  joint->Begin(starts);
  for (const auto& part : parts) EXPECT_TRUE(part->Map(slot, 96));
  for (const auto& pool : pools) EXPECT_EQ(pool->Rows()[0].reserved, 96);

  for (const auto& part : parts) {
    EXPECT_OK(StartRelease(*part->pool(), {slot}));
    part->Edit(SlotOpcode::kVacate, slot);
    EXPECT_EQ(part->pool()->Numbers().slots_draining, 0);
    EXPECT_OK(part->pool()->TakeFault());
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, JointKernelsTest, ::testing::Values(2, 4));

}  // namespace
}  // namespace kvpage::testing
