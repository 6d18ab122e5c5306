// The sequences of attention on plain page arrays: valid and invalid lengths, offsets and tables.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/check.cuh"
#include "tests/cuda_util.h"
#include "tests/expect_ok.h"

namespace kvpage::testing {
namespace {

constexpr int kWidth = 4, kPageTokens = 16, kPages = 9;

struct Tables {
  std::vector<std::int32_t> table, lengths, offsets;
  std::int64_t num_tokens = 0;
  std::unique_ptr<char[]> scratch;

  explicit Tables(std::vector<std::int32_t> of, std::vector<std::int32_t> at)
      : table(of.size() * kWidth), lengths(std::move(of)), offsets(std::move(at)), num_tokens(offsets.back()) {
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(i % kPages);
  }

  const CheckedBatch& Check() {
    const auto pages = Exactly(table), length = Exactly(lengths), offset = Exactly(offsets), window = Ints({77});
    KVView view;
    view.table = pages.get();
    view.table_width = kWidth;
    view.tokens_per_chunk = kPageTokens;
    const auto count = static_cast<std::int64_t>(lengths.size());
    scratch = Scratch(count, 0);
    EXPECT_OK(cuda::LaunchTableCheck(view, kPages, length.get(), offset.get(), count, num_tokens, window.get(),
                                     scratch.get(), nullptr));
    return *reinterpret_cast<const CheckedBatch*>(scratch.get());
  }
};

TEST(CudaTablesTest, SequencesFromTables) {
  // Decode, prefill, no query, no context, longer than its table, fewer tokens than queries, a full table, length -1.
  Tables tables({20, 33, 5, 0, 65, 2, 64, -1}, {0, 1, 34, 34, 36, 37, 40, 41, 42});
  const CheckedBatch& checked = tables.Check();
  EXPECT_EQ(checked.ok, 1);
  EXPECT_EQ(checked.num_sequences, 8);
  EXPECT_EQ(checked.sliding_window, 77);
  EXPECT_EQ(checked.layer, 0);
  EXPECT_EQ(checked.view.table_width, kWidth);
  const std::int32_t slots[] = {0, 1, -1, -1, cuda::kWrongSequence, cuda::kWrongSequence, 6, -1};
  const std::int32_t positions[] = {19, 0, 0, 0, 0, 0, 63, 0};
  for (int s = 0; s < 8; ++s) {
    const Sequence& sequence = checked.sequences()[s];
    EXPECT_EQ(sequence.slot, slots[s]) << s;
    EXPECT_EQ(sequence.query_begin, tables.offsets[s]) << s;
    EXPECT_EQ(sequence.query_length, tables.offsets[s + 1] - tables.offsets[s]) << s;
    EXPECT_TRUE(sequence.slot < 0 || sequence.position == positions[s]) << s << " " << sequence.position;
  }
}

TEST(CudaTablesTest, PagesThatDoNotExist) {
  for (const std::int32_t page : {-1, kPages, 1 << 30}) {
    for (int at = 0; at < kWidth; ++at) {
      Tables tables({33, 50, 33}, {0, 1, 2, 3});
      tables.table[kWidth + at] = page;
      tables.table[3] = -7;  // beyond the length: never read
      const CheckedBatch& checked = tables.Check();
      EXPECT_EQ(checked.ok, 1);
      EXPECT_EQ(checked.sequences()[0].slot, 0);
      EXPECT_EQ(checked.sequences()[1].slot, cuda::kWrongSequence);
      EXPECT_EQ(checked.sequences()[2].slot, 2);
    }
  }
}

TEST(CudaTablesTest, OffsetsThatCannotBeRight) {
  Tables start({5, 5}, {1, 2, 3}), order({5, 5, 5}, {0, 2, 1, 3}), end({5, 5}, {0, 1, 2});
  end.num_tokens = 1;
  EXPECT_EQ(start.Check().ok, 0);
  EXPECT_EQ(order.Check().ok, 0);
  EXPECT_EQ(end.Check().ok, 0);
  Tables none({}, {0});
  EXPECT_EQ(none.Check().ok, 1);
  EXPECT_EQ(none.Check().num_sequences, 0);
}

TEST(CudaTablesTest, TokensFindTheirSequence) {
  // Decode at first, then empty and longer sequences; tokens after the last sequence are padding.
  Tables tables({9, 9, 9, 9, 9, 9}, {0, 1, 2, 2, 5, 5, 9});
  tables.num_tokens = 12;
  const CheckedBatch& checked = tables.Check();
  const std::int32_t owners[] = {0, 1, 3, 3, 3, 5, 5, 5, 5, -1, -1, -1};
  for (int token = 0; token < 12; ++token) EXPECT_EQ(cuda::SequenceOf(checked, token), owners[token]) << token;
  Tables none({}, {0});
  EXPECT_EQ(cuda::SequenceOf(none.Check(), 0), -1);
}

}  // namespace
}  // namespace kvpage::testing
