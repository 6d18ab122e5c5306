// addressing="table" on CUDA, from the host's decisions to the kernels' output: the emulated kernels read and write a
// pool on the fake driver through its block table and window, with the same bits as through its slots.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "testing/cuda_emulation/copy_counter.h"
#include "tests/cuda_util.h"
#include "tests/device_util.h"
#include "tests/expect_ok.h"
#include "tests/kernels_elements.h"
#include "tests/rounds.h"

namespace kvpage::testing {
namespace {

constexpr std::int64_t kHeads = 2, kGroup = 2, kDim = 64, kMaxTokens = 576;

struct Config {
  DType dtype, q_dtype;
  Layout layout;
  std::int64_t block_tokens;
};

Geometry GeometryOf(const Config& config) {
  Geometry geometry;
  const std::int64_t row = kHeads * (kDim * static_cast<std::int64_t>(ItemSize(config.dtype)) +
                                     static_cast<std::int64_t>(ScaleSize(config.dtype)));
  const std::int64_t rows = config.block_tokens * (config.layout == Layout::kFused ? 2 * kLayers : 1);
  EXPECT_OK(Geometry::Make({kLayers, kHeads, kDim, kSlots, kMaxTokens, static_cast<std::int64_t>(config.dtype),
                            static_cast<std::int64_t>(config.layout), config.block_tokens},
                           (row * rows + 4095) / 4096 * 4096, &geometry));
  return geometry;
}

// New tokens of a step: (slot, count).
using Step = std::vector<std::pair<std::int32_t, std::int32_t>>;

// Inputs of a step: rows of q, k and v for each layer.
struct Inputs {
  std::int32_t tokens = 0;
  std::vector<char> q, k, v;
};

// A pool and a program's cache value.
struct Side {
  Side(Machine* m, std::int32_t id, const Config& c, bool table) : machine(m), config(c), by_table(table) {
    const Geometry geometry = GeometryOf(config);
    EXPECT_OK(machine->Open(id, geometry, 4 * geometry.max_blocks() * geometry.num_ranges(), &pool, 0,
                            {false, /*poison=*/true}));
    Pool::Generation generation;
    EXPECT_OK(pool->NewGeneration(&generation));
    handle[0] = id;
    handle[1] = generation.generation;
    epoch = generation.epoch;
    lengths = generation.lengths;
  }
  cuda::CacheOperands Cache(DeviceOp op) {
    return {op, machine->device()->table(), handle, &epoch, lengths.data(), pool->geometry().spec()};
  }
  void Edit(DeviceOp op, SlotOpcode opcode, std::int32_t slot, std::int32_t length = 0, std::int32_t donor = -1) {
    const SlotEdit edit = {static_cast<std::int32_t>(opcode), slot, length, donor};
    EXPECT_OK(cuda::EditSlots(Cache(op), handle, {&edit, 1, nullptr, 0}, &epoch, lengths.data(), nullptr, nullptr));
  }
  std::int32_t Acquire(std::int64_t tokens) {
    const Claim claim = pool->Acquire({tokens});
    EXPECT_OK(claim.status);
    Edit(DeviceOp::kAcquire, SlotOpcode::kOccupy, claim.slots.at(0));
    return claim.slots[0];
  }
  void Release(std::int32_t slot) {
    EXPECT_OK(StartRelease(*pool, {slot}));
    Edit(DeviceOp::kRelease, SlotOpcode::kVacate, slot);
  }
  // Forks full blocks only, so there is nothing to copy.
  std::int32_t Fork(std::int32_t donor, std::int32_t tokens) {
    const std::int64_t more = lengths[donor] - static_cast<std::int64_t>(pool->Committed(donor).size());
    EXPECT_OK(pool->Commit(donor, std::vector<std::int32_t>(more, 7)));
    const Claim claim = pool->Fork("fork", {{donor, tokens}}, {});
    EXPECT_OK(claim.status);
    Edit(DeviceOp::kFork, SlotOpcode::kFork, claim.slots.at(0), tokens, donor);
    return claim.slots[0];
  }
  void Truncate(std::int32_t slot, std::int32_t tokens) {
    EXPECT_OK(pool->Truncate({slot}, {tokens}).status);
    Edit(DeviceOp::kTruncate, SlotOpcode::kTruncate, slot, tokens);
  }

  // Attention of a step in one layer; with `append`, update_and_attend.
  std::vector<char> Attend(const Step& step, const Inputs& in, std::int32_t layer, bool append, bool through_table) {
    std::vector<std::int32_t> slots, offsets = {0};
    for (const auto& [slot, count] : step) {
      slots.push_back(slot);
      offsets.push_back(offsets.back() + count);
    }
    const auto count = static_cast<std::int64_t>(slots.size());
    const std::size_t rows = in.q.size() / kLayers;
    std::vector<char> out(rows + static_cast<std::size_t>(in.tokens) * kHeads * kGroup * sizeof(float), '\x55');
    cuda::AttentionOperands attention;
    attention.layer = &layer;
    attention.q = in.q.data() + layer * rows;
    attention.out = out.data();
    attention.lse = reinterpret_cast<float*>(out.data() + rows);
    attention.q_dtype = config.q_dtype;
    attention.kv_dtype = config.dtype;
    attention.num_q_heads = kHeads * kGroup;
    attention.num_kv_heads = kHeads;
    attention.head_dim = kDim;
    attention.max_context = kMaxTokens;
    attention.max_slots = kSlots;
    attention.by_table = through_table;
    attention.least_saved_bytes = 0;
    attention.may_share = together;
    attention.options.scale = 0.125f;
    cuda::AppendOperands appended = {
        &layer, in.k.data() + layer * rows / kGroup, in.v.data() + layer * rows / kGroup, config.q_dtype, kHeads, kDim};
    const cuda::BatchOperands batch = {slots.data(), offsets.data(), count, in.tokens};
    const auto scratch = Exactly<char>(cuda::AttentionBytes(attention, count, in.tokens));
    const auto plan = Exactly<char>(cuda::PlanBytes(count));
    EXPECT_OK(cuda::PlanAttention(Cache(DeviceOp::kPagedAttention), batch, attention, plan.get(), nullptr));
    std::uint32_t next = epoch;
    const std::int64_t copied_before = emulation::NumCopiedBytes();
    EXPECT_OK(cuda::Attend(Cache(append ? DeviceOp::kUpdateAndAttend : DeviceOp::kPagedAttention), batch, attention,
                           append ? &appended : nullptr, plan.get(), &next, scratch.get(), nullptr));
    epoch = next;
    copied_bytes = emulation::NumCopiedBytes() - copied_before;
    return out;
  }
  void Advance(const Step& step) {
    std::vector<std::int32_t> slots, offsets = {0};
    for (const auto& [slot, count] : step) {
      slots.push_back(slot);
      offsets.push_back(offsets.back() + count);
    }
    const cuda::BatchOperands batch = {slots.data(), offsets.data(), static_cast<std::int64_t>(slots.size()), -1};
    EXPECT_OK(cuda::Advance(Cache(DeviceOp::kAdvance), batch, &epoch, lengths.data(), nullptr));
    EXPECT_OK(pool->TakeFault());
  }

  Machine* const machine;
  const Config config;
  const bool by_table;
  bool together = true;           // whether sequences with a common prefix are grouped
  std::int64_t copied_bytes = 0;  // bytes of keys, values and queries that the last call copied to shared memory
  std::shared_ptr<Pool> pool;
  std::int32_t handle[2] = {0, 0};
  std::uint32_t epoch = 0;
  std::vector<std::int32_t> lengths;
};

// Two pools with the same history: one is accessed through slots, the other through its table.
struct Twins {
  explicit Twins(const Config& config) : slots(&machine, 300, config, false), table(&machine, 301, config, true) {}

  // Returns the result of a host call, which must be the same for both.
  template <class Do>
  std::int32_t Each(const Do& act) {
    const std::int32_t first = act(slots), second = act(table);
    EXPECT_EQ(first, second);
    return first;
  }
  std::int32_t Acquire(std::int64_t tokens) {
    return Each([&](Side& side) { return side.Acquire(tokens); });
  }
  void Extend(std::int32_t slot, std::int64_t tokens) {
    for (Side* side : {&slots, &table}) EXPECT_OK(side->pool->Extend({slot}, {tokens}).status);
  }

  Inputs Random(const Step& step) {
    Inputs in;
    for (const auto& [slot, count] : step) in.tokens += count;
    const std::size_t item = ItemSize(slots.config.q_dtype);
    std::normal_distribution<float> normal;
    for (auto [rows, heads] : {std::pair{&in.q, kHeads * kGroup}, std::pair{&in.k, kHeads}, std::pair{&in.v, kHeads}}) {
      const auto count = static_cast<std::size_t>(kLayers * in.tokens * heads * kDim);
      rows->resize(count * item);
      for (std::size_t i = 0; i < count; ++i) Write(&(*rows)[i * item], slots.config.q_dtype, normal(rng));
    }
    return in;
  }
  void Run(const Step& step) {
    const Inputs in = Random(step);
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      const std::vector<char> out = slots.Attend(step, in, layer, true, false);
      EXPECT_FALSE(std::isnan(Read(out.data(), slots.config.q_dtype)));
      EXPECT_EQ(table.Attend(step, in, layer, true, true), out) << "layer " << layer;
      EXPECT_EQ(table.Attend(step, in, layer, false, false), out) << "read through the slots";
    }
    slots.Advance(step);
    table.Advance(step);
  }

  Machine machine;
  std::mt19937 rng{3};
  Side slots, table;
};

class CudaTableAddressingTest : public ::testing::TestWithParam<Config> {};

// Chunks of part of a tile (16), of one or half a tile (64), and of neither (48).
std::vector<Config> Configs() {
  constexpr auto kF = Layout::kFused, kP = Layout::kPerLayer;
  return {{DType::kBF16, DType::kBF16, kF, 16},  {DType::kBF16, DType::kBF16, kP, 16},
          {DType::kBF16, DType::kBF16, kP, 48},  {DType::kBF16, DType::kBF16, kP, 64},
          {DType::kI8, DType::kBF16, kF, 48},    {DType::kI8, DType::kBF16, kP, 16},
          {DType::kI8, DType::kBF16, kP, 48},    {DType::kI8, DType::kBF16, kP, 64},
          {DType::kF16, DType::kF16, kF, 64},    {DType::kF16, DType::kF16, kP, 16},
          {DType::kF32, DType::kF32, kF, 16},    {DType::kF32, DType::kF32, kP, 48},
          {DType::kF8E4M3, DType::kF16, kF, 16}, {DType::kF8E4M3, DType::kF16, kP, 48},
          {DType::kF8E4M3, DType::kF32, kP, 16}};  // this one uses the general kernel
}

std::string NameOf(const ::testing::TestParamInfo<Config>& info) {
  const Config& c = info.param;
  return "storage" + std::to_string(static_cast<int>(c.dtype)) + "_queries" +
         std::to_string(static_cast<int>(c.q_dtype)) + (c.layout == Layout::kFused ? "_fused_" : "_per_layer_") +
         std::to_string(c.block_tokens);
}

INSTANTIATE_TEST_SUITE_P(Configs, CudaTableAddressingTest, ::testing::ValuesIn(Configs()), NameOf);

TEST_P(CudaTableAddressingTest, IsBitIdenticalToSlots) {
  Twins twins(GetParam());
  const auto block = static_cast<std::int32_t>(GetParam().block_tokens);
  const std::int32_t a = twins.Acquire(50), b = twins.Acquire(20);
  EXPECT_OK(twins.table.pool->OpenTable());  // on a pool that already has blocks
  twins.Run({{a, 40}, {b, 3}});              // prefill and decode
  twins.Extend(a, 160);                      // in blocks behind those of b
  twins.Run({{b, 1}, {a, 95}});
  const std::int32_t fork = twins.Each([&](Side& side) { return side.Fork(a, 2 * block); });
  twins.Extend(fork, 160);
  twins.Run({{fork, 9}, {a, 1}, {b, 1}});
  for (Side* side : {&twins.slots, &twins.table}) side->Truncate(fork, block + 4);  // inside a block that the two share
  twins.Run({{fork, 9}, {a, 1}});
  for (Side* side : {&twins.slots, &twins.table}) side->Release(b);
  const std::int32_t c = twins.Acquire(20);
  twins.Run({{c, 17}, {fork, 1}, {a, 1}});
  // Both pools have the same contents.
  for (const auto& [slot, tokens] : Step{{a, 138}, {fork, block + 14}, {c, 17}}) {
    ASSERT_EQ(twins.table.lengths[slot], tokens);
    for (std::int32_t token = 0; token < tokens; ++token) {
      for (int i = 0; i < 2 * kLayers; ++i) {
        for (std::int64_t head = 0; head < kHeads; ++head) {
          EXPECT_EQ(std::memcmp(twins.slots.pool->View().At(slot, token, i / 2, i % 2, head),
                                twins.table.pool->View().At(slot, token, i / 2, i % 2, head),
                                kDim * ItemSize(GetParam().dtype)),
                    0);
        }
      }
    }
  }
}

// Forks of a sequence of more than two spans, grouped through the table and separate through the slots.
TEST(CudaTableAddressingGroupsTest, SharedSpansAreReadOnce) {
  for (const Config& config : {Config{DType::kBF16, DType::kBF16, Layout::kFused, 16},
                               Config{DType::kF16, DType::kF16, Layout::kPerLayer, 48}}) {
    Twins twins(config);
    constexpr std::int32_t kShared = 528;
    const std::int32_t a = twins.Acquire(540);
    EXPECT_OK(twins.table.pool->OpenTable());
    twins.Run({{a, 530}});
    const auto fork = [&](Side& side) { return side.Fork(a, kShared); };
    const std::int32_t b = twins.Each(fork), c = twins.Each(fork);
    for (const std::int32_t slot : {a, b, c}) twins.Extend(slot, kMaxTokens);
    twins.slots.together = false;
    Step step = {{a, 1}, {c, 2}, {b, 1}};
    twins.Run(step);  // a and b are grouped
    const Inputs in = twins.Random(step);
    const std::vector<char> out = twins.slots.Attend(step, in, 1, true, false);
    for (const bool through_table : {false, true}) {
      EXPECT_EQ(twins.table.Attend(step, in, 1, true, through_table), out);
      const std::int64_t spans = std::int64_t{2} * 512 * kHeads * kDim * 2;
      EXPECT_EQ(twins.slots.copied_bytes - twins.table.copied_bytes, spans);
    }
    // One slot now shares less, and one shares nothing.
    for (Side* side : {&twins.slots, &twins.table}) side->Truncate(b, 300);
    for (Side* side : {&twins.slots, &twins.table}) side->Release(c);
    step = {{b, 1}, {a, 1}, {twins.Acquire(560), 1}};
    twins.Run(step);
  }
}

// Random forks, truncations, writes and releases: groups form and dissolve, and results equal those without groups.
TEST(CudaTableAddressingGroupsTest, RandomLives) {
  Twins twins({DType::kBF16, DType::kBF16, Layout::kFused, 16});
  twins.slots.together = false;
  std::vector<std::int32_t> live = {twins.Acquire(kMaxTokens)};
  EXPECT_OK(twins.table.pool->OpenTable());
  twins.Run({{live[0], 530}});
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(twins.rng); };
  int grouped = 0;
  for (int round = 0; round < Rounds(16); ++round) {
    const auto at = static_cast<std::size_t>(pick(0, static_cast<int>(live.size()) - 1));
    const std::int32_t slot = live[at], length = twins.table.lengths[slot];
    const int kind = pick(0, 5);
    if (live.size() < 4 && kind < 4) {
      const std::int32_t tokens = std::min(length, pick(250, 570)) / 16 * 16;
      live.push_back(twins.Each([&](Side& side) { return side.Fork(slot, tokens); }));
      twins.Extend(live.back(), kMaxTokens);
    } else if (kind < 3 || live.size() == 1) {
      const std::int32_t tokens = pick(length / 2, length);
      for (Side* side : {&twins.slots, &twins.table}) side->Truncate(slot, tokens);
    } else if (kind > 3) {
      for (Side* side : {&twins.slots, &twins.table}) side->Release(slot);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
    }
    std::shuffle(live.begin(), live.end(), twins.rng);
    Step step;
    for (const std::int32_t other : live) {
      if (twins.table.lengths[other] + 2 <= kMaxTokens) step.emplace_back(other, pick(0, 5) == 0 ? 2 : 1);
    }
    if (step.empty()) continue;
    twins.Run(step);
    grouped += twins.table.copied_bytes < twins.slots.copied_bytes;
  }
  EXPECT_GT(grouped, 4);
}

TEST(CudaTableAddressingFaultsTest, APoolWithoutATableRefusesInWords) {
  Twins twins({DType::kF32, DType::kF32, Layout::kFused, 16});
  const std::int32_t slot = twins.Acquire(20);
  const Step step = {{slot, 2}};
  const Inputs in = twins.Random(step);
  const std::uint32_t epoch = twins.table.epoch;
  const std::vector<char> out = twins.table.Attend(step, in, 0, true, true);
  EXPECT_TRUE(std::isnan(Read(out.data(), DType::kF32)));
  EXPECT_EQ(twins.table.epoch, epoch);
  EXPECT_TRUE(Mentions(twins.table.pool->TakeFault(), "update_and_attend: pool 301 had no block table on its device"));
  EXPECT_OK(twins.table.pool->OpenTable());
  twins.Run(step);
}

}  // namespace
}  // namespace kvpage::testing
