// copy_rotated: the CPU and the emulated device produce the same bytes, those of the float64 rotation rounded to the
// storage type, and give the same answers to random programs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "tests/cuda_random_ops.h"
#include "tests/cuda_twins.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr std::int32_t kNumSlots = 3, kBlockTokens = 16, kMaxTokens = 100, kNumLayers = 2, kHeads = 2;
const std::vector<std::int32_t> kLengths = {60, 21, 3};

Geometry GeometryOf(std::int64_t head_dim, DType dtype, Layout layout) {
  Geometry geometry;
  const SpecInts spec = {kNumLayers,
                         kHeads,
                         head_dim,
                         kNumSlots,
                         kMaxTokens,
                         static_cast<std::int64_t>(dtype),
                         static_cast<std::int64_t>(layout),
                         kBlockTokens};
  const std::int64_t row =
      head_dim * static_cast<std::int64_t>(ItemSize(dtype)) + static_cast<std::int64_t>(ScaleSize(dtype));
  const std::int64_t block = kBlockTokens * kHeads * row * (layout == Layout::kFused ? 2 * kNumLayers : 1);
  EXPECT_OK(Geometry::Make(spec, block, &geometry));
  return geometry;
}

struct Threads final : Parallel {
  int num_workers() const override { return 3; }
  void For(std::int64_t tasks, const std::function<void(std::int64_t, int)>& fn) override {
    for (std::int64_t task = tasks - 1; task >= 0; --task) fn(task, static_cast<int>(task % 3));
  }
};

// Calls fn(layer, K|V, head) for each row of a token.
template <class Fn>
void ForRows(Fn&& fn) {
  for (int layer = 0; layer < kNumLayers; ++layer) {
    for (int kv = 0; kv < 2; ++kv) {
      for (int head = 0; head < kHeads; ++head) fn(layer, kv, head);
    }
  }
}

std::vector<float> ReadRow(const KVView& view, std::int64_t slot, std::int64_t token, int layer, int kv, int head) {
  std::vector<float> row(static_cast<std::size_t>(view.head_dim));
  const char* const from = view.At(slot, token, layer, kv, head);
  if (IsQuantized(view.dtype)) {
    cpu::ActiveKernels().dequantize(row.data(), from, view.dtype, *view.Scale(slot, token, layer, kv, head),
                                    view.head_dim);
  } else {
    cpu::ActiveKernels().convert(row.data(), DType::kF32, from, view.dtype, view.head_dim);
  }
  return row;
}

void Fill(const KVView& view, Rng* rng) {
  std::vector<float> row(static_cast<std::size_t>(view.head_dim));
  for (int slot = 0; slot < kNumSlots; ++slot) {
    for (int token = 0; token < kMaxTokens; ++token) {
      ForRows([&](int layer, int kv, int head) {
        for (float& x : row) x = static_cast<float>(Pick(*rng, -1000, 1000)) / 300.0f;
        char* const to = view.At(slot, token, layer, kv, head);
        if (IsQuantized(view.dtype)) {
          cpu::ActiveKernels().quantize(to, view.Scale(slot, token, layer, kv, head), view.dtype, row.data(),
                                        DType::kF32, view.head_dim);
        } else {
          cpu::ActiveKernels().convert(to, view.dtype, row.data(), DType::kF32, view.head_dim);
        }
      });
    }
  }
}

// Returns the error bound of element x in a row whose largest element is `top`.
double Bound(DType dtype, double x, double top) {
  switch (dtype) {
    case DType::kF32:
      return 2e-6;
    case DType::kBF16:
      return std::abs(x) / 256 + 2e-6;
    case DType::kF16:
      return std::abs(x) / 2048 + 2e-6;
    case DType::kI8:
      return 1.001 * top / 254;
    case DType::kF8E4M3:
      return 1.001 * std::max(std::abs(x) / 16, top / 448 / 1024) + 1e-6;
  }
  return 0;
}

void CheckSegment(const KVView& before, const KVView& after, const SegmentCopy& copy, const Rotation& rotation) {
  const std::int32_t to = kLengths[copy.target];
  const auto dim = static_cast<std::size_t>(before.head_dim);
  for (std::int32_t i = 0; i < copy.count; ++i) {
    ForRows([&](int layer, int kv, int head) {
      const std::vector<float> from = ReadRow(before, copy.source, copy.begin + i, layer, kv, head);
      const std::vector<float> got = ReadRow(after, copy.target, to + i, layer, kv, head);
      const float* const inv_freq = rotation.inv_freq + layer * rotation.pairs;
      const bool still =
          to == copy.begin || std::all_of(inv_freq, inv_freq + rotation.pairs, [](float f) { return f == 0.0f; });
      if (kv == 1 || still) {
        EXPECT_EQ(got, from);
        return;
      }
      std::vector<double> wanted(from.begin(), from.end());
      for (int p = 0; p < rotation.pairs; ++p) {
        const int a = rotation.interleaved ? 2 * p : p, b = rotation.interleaved ? a + 1 : p + rotation.pairs;
        const double angle = static_cast<double>(to - copy.begin) * inv_freq[p];
        wanted[a] = from[a] * std::cos(angle) - from[b] * std::sin(angle);
        wanted[b] = from[b] * std::cos(angle) + from[a] * std::sin(angle);
      }
      double top = 0;
      for (const double x : wanted) top = std::max(top, std::abs(x));
      for (std::size_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(got[d], wanted[d], Bound(before.dtype, wanted[d], top)) << "token " << i << " element " << d;
      }
    });
  }
}

void CheckCopies(const Geometry& geometry, const std::vector<SegmentCopy>& copies, const Rotation& rotation) {
  Rng rng(3);
  std::vector<char> start(static_cast<std::size_t>(geometry.virtual_bytes()));
  Fill(geometry.View(start.data()), &rng);
  std::vector<char> cpu = start, device = start;
  Threads threads;
  const auto count = static_cast<std::int64_t>(copies.size());
  std::vector<std::int32_t> to;
  for (const SegmentCopy& copy : copies) to.push_back(copy.target >= 0 ? kLengths[copy.target] : 0);
  cpu::CopyRotated(geometry.View(cpu.data()), kNumLayers, {copies.data(), count}, to, rotation, threads);
  for (const SegmentCopy& copy : copies) {
    if (copy.source >= 0) CheckSegment(geometry.View(start.data()), geometry.View(cpu.data()), copy, rotation);
  }
  DeviceTable table;
  PoolRows rows = table.Add(geometry.spec(), geometry.View(device.data()), 5);
  for (int slot = 0; slot < kNumSlots; ++slot) {
    rows.slot(slot).room = kMaxTokens;
    for (int layer = 0; layer < kNumLayers; ++layer) rows.written(slot, layer) = kLengths[slot];
  }
  const auto frequencies =
      Exactly(std::vector<float>(rotation.inv_freq, rotation.inv_freq + kNumLayers * rotation.pairs));
  const Rotation on_device = {frequencies.get(), rotation.pairs, rotation.interleaved};
  const auto run = [&](std::int32_t generation, std::vector<std::int32_t>* lengths) {
    const CacheBuffers buffers(5, generation, rows.entry().epoch, kLengths);
    const auto own = Ints({5, 0});
    const auto list = Exactly(copies);
    const auto scratch = Scratch(0, 0);
    EXPECT_OK(cuda::CopyRotated(buffers.Operands(DeviceOp::kReuseSegment, table, geometry.spec()), own.get(),
                                {list.get(), count}, on_device, buffers.epoch.get(), buffers.lengths.get(),
                                scratch.get(), nullptr));
    lengths->assign(buffers.lengths.get(), buffers.lengths.get() + kNumSlots);
    return rows.TakeFault().kind;
  };
  std::vector<std::int32_t> lengths;
  EXPECT_EQ(run(1, &lengths), static_cast<std::int32_t>(FaultKind::kGeneration));
  EXPECT_EQ(lengths, kLengths);
  EXPECT_TRUE(device == start) << "a failed check copied";
  EXPECT_EQ(run(0, &lengths), 0);
  EXPECT_TRUE(device == cpu);
  std::vector<std::int32_t> wanted = kLengths;
  for (const SegmentCopy& copy : copies) {
    if (copy.source >= 0) wanted[copy.target] += copy.count;
  }
  EXPECT_EQ(lengths, wanted);
  for (int slot = 0; slot < kNumSlots; ++slot) {
    EXPECT_EQ(rows.slot(slot).length == 0 ? kLengths[slot] : rows.slot(slot).length, wanted[slot]);
    EXPECT_EQ(rows.written(slot, 1), wanted[slot]);
  }
}

TEST(CudaCopyRotatedTest, TheSameBytesAsOnCpu) {
  const std::vector<std::vector<SegmentCopy>> lists = {
      {{0, 1, 2, 50, 21}, {0, 2, 40, 20, 0}},    // to later and to earlier positions, across blocks
      {{-1, -1, -1, -1, -1}, {0, 2, 3, 30, 3}},  // padding; the same positions
      {{1, 2, 20, 1, 0}, {-1, 0, 0, 0, 0}},      // a single token
      {{1, 2, 4, 0, 0}},                         // no tokens
      {},
  };
  const std::vector<float> frequencies = {1.0f, 0.5f, 0.01f, 2.5f, 0.125f, 0.0f, 3.0f, 0.25f,
                                          0.0f, 0.0f, 0.0f,  0.0f, 0.0f,   0.0f, 0.0f, 0.0f};
  for (const Layout layout : {Layout::kFused, Layout::kPerLayer}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI8, DType::kF8E4M3}) {
      for (const auto& [head_dim, pairs] :
           std::vector<std::pair<std::int64_t, std::int32_t>>{{16, 8}, {7, 2}, {4, 0}}) {
        for (const bool interleaved : {false, true}) {
          SCOPED_TRACE(std::string(Name(dtype)) + " " + std::to_string(head_dim) + (interleaved ? " interleaved" : ""));
          const Geometry geometry = GeometryOf(head_dim, dtype, layout);
          for (const std::vector<SegmentCopy>& list : lists) {
            CheckCopies(geometry, list, {frequencies.data(), pairs, interleaved});
          }
        }
      }
    }
  }
}

// Twins with one more op. Only the check and the slot table are exercised: nothing is rotated.
class SegmentTwins : public Twins {
 public:
  using Twins::Twins;

  std::string CopyRotated(const Value& value, const std::vector<SegmentCopy>& copies) {
    Value cpu = value;
    const auto list = [&](const SegmentCopy* c) { return SegmentList{c, static_cast<std::int64_t>(copies.size())}; };
    Status status;
    {
      PinnedSlots pinned;
      std::vector<std::int32_t> to;
      status = pool().CopyRotated("reuse_segment", Ref(value), list(copies.data()), &pinned, &cpu.epoch,
                                  cpu.lengths.data(), &to);
    }
    Value device = value;
    const Operands operands(this, DeviceOp::kReuseSegment, &device, {}, {});
    const auto own = Ints({kId, 1});
    const auto device_copies = Exactly(copies);
    const auto scratch = Scratch(0, 0);
    const std::vector<char> before = rows().State();
    EXPECT_OK(cuda::CopyRotated(operands.cache(), own.get(), list(device_copies.get()), Rotation(),
                                operands.new_epoch(), operands.new_lengths(), scratch.get(), nullptr));
    return Finish(DeviceOp::kReuseSegment, status, before, value, cpu, operands);
  }
};

// Valid copies between occupied slots, and invalid ones.
std::vector<SegmentCopy> RandomCopies(Twins& t) {
  Rng& rng = t.rng();
  std::vector<std::int32_t> slots = Occupied(t);
  std::shuffle(slots.begin(), slots.end(), rng);
  std::vector<SegmentCopy> copies;
  for (std::size_t i = 0; i + 1 < slots.size() && i < 4; i += 2) {
    const std::int32_t length = std::max(t.value().lengths[slots[i]], 0);
    const std::int32_t begin = Pick(rng, 0, length);
    copies.push_back({slots[i], slots[i + 1], begin, Pick(rng, 0, std::min(length - begin, 6)), 0});
    SegmentCopy& copy = copies.back();
    switch (Pick(rng, 0, 19)) {
      case 0:
        copy.source = AnySlot(t);
        break;
      case 1:
        copy.target = AnySlot(t);
        break;
      case 2:
        copy.begin = Pick(rng, -2, 130);
        break;
      case 3:
        copy.count = Pick(rng, -2, 130);
        break;
      case 4:
        copy.committed = Pick(rng, 0, 60);
        break;
      case 5:
        copy.source = -1;
        break;
      case 6:
        copy.target = copies[0].target;
        break;
      case 7:
        copy.target = copies[0].source;
        break;
      default:
        break;
    }
  }
  return copies;
}

TEST(CudaCopyRotatedTest, RandomProgramsGetTheSameAnswers) {
  std::set<std::string> kinds;
  std::int64_t copied = 0;
  for (int round = 0; round < 6; ++round) {
    const Layout layout = round % 2 == 0 ? Layout::kFused : Layout::kPerLayer;
    SegmentTwins twins(SmallGeometry(layout), layout == Layout::kFused ? 20 : 60, round % 3 == 0,
                       static_cast<std::uint64_t>(round));
    for (int i = 0; i < 400 && !::testing::Test::HasFailure(); ++i) {
      if (i % 3 == 0) {
        const std::vector<SegmentCopy> copies = RandomCopies(twins);
        copied += !copies.empty() && twins.CopyRotated(twins.PickForged(), copies).empty() ? 1 : 0;
      } else {
        RandomOp(twins, /*drops=*/round % 2 == 0);
      }
      EXPECT_OK(twins.pool().Audit()) << "op " << i;
      if (i % 8 == 0) twins.CompareState();
    }
    kinds.insert(twins.kinds().begin(), twins.kinds().end());
  }
  EXPECT_GT(copied, 100);
  for (const FaultKind kind :
       {FaultKind::kGeneration, FaultKind::kEpoch, FaultKind::kSlotRange, FaultKind::kSlotFree, FaultKind::kCopyTokens,
        FaultKind::kCopyTwice, FaultKind::kCopyChain, FaultKind::kMaxSeqLen, FaultKind::kUnmapped, FaultKind::kDropped,
        FaultKind::kShared, FaultKind::kUnwritten, FaultKind::kCommittedAhead}) {
    EXPECT_EQ(kinds.count("reuse_segment " + std::to_string(static_cast<int>(kind))), 1) << static_cast<int>(kind);
  }
}

}  // namespace
}  // namespace kvpage::testing
