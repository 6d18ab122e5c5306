// The directory of a store: the counts that are kept as files come and go, against a walk over all files.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "tests/store_util.h"

namespace kvpage::store::testing {
namespace {

struct Counts {
  std::vector<std::int64_t> refused = std::vector<std::int64_t>(kNumProblems);
  std::int64_t foreign = 0, files = 0;
};

Counts Walk(const Directory& directory, const std::string& fingerprint) {
  Counts counts;
  for (const std::string& name : directory.Names()) {
    ++counts.files;
    Identity identity;
    if (const Problem problem = directory.ProblemOf(name); problem != Problem::kNone) {
      ++counts.refused[static_cast<int>(problem)];
    } else if (!directory.RunOf(name, &identity).tokens.empty()) {
      counts.foreign += identity.fingerprint != fingerprint;
    }
  }
  return counts;
}

TEST(DirectoryTest, KeptCountsAreThoseOfAWalk) {
  Directory directory;
  std::minstd_rand random(1);
  const std::vector<std::string> models = {"model", "other", "third"};
  const auto name = [&] { return "file " + std::to_string(random() % 40); };
  std::int64_t most_refused = 0, most_foreign = 0;
  for (int step = 0; step < 4000; ++step) {
    const std::string file = name();
    const auto problem = static_cast<Problem>(1 + random() % (kNumProblems - 1));
    switch (random() % 5) {
      case 0:
      case 1: {
        FileHeader header;
        const std::int64_t blocks = 1 + random() % 4;
        header.identity = {SmallShape(), models[random() % models.size()], ""};
        header.tokens = MakeTokens(blocks, random() % 5, random() % blocks);
        header.first_block = random() % blocks;
        header.checksums.resize(blocks - header.first_block);
        directory.Add(file, 100, header);  // often replaces another file
        break;
      }
      case 2:
        directory.AddRefused(file, 50, problem);
        break;
      case 3:
        directory.Refuse(file, problem);
        break;
      default:
        directory.Remove(file);
    }
    for (const std::string& model : models) {
      const Counts counts = Walk(directory, model);
      ASSERT_EQ(directory.refused(), counts.refused) << step;
      ASSERT_EQ(directory.CountForeign(model), counts.foreign) << step;
      ASSERT_EQ(directory.num_files(), counts.files) << step;
      most_foreign = std::max(most_foreign, counts.foreign);
      for (const std::int64_t refused : counts.refused) most_refused = std::max(most_refused, refused);
    }
  }
  EXPECT_GT(most_refused, 2);
  EXPECT_GT(most_foreign, 5);
}

}  // namespace
}  // namespace kvpage::store::testing
