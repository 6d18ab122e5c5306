// The prefix index: random operations against a plain model.
#include "cache/prefix_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/prefix_model.h"

namespace kvpage::testing {
namespace {

constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();
constexpr std::int32_t kSlots = 5;

// An index and its model. Every slot follows the caller's rules: it extends its sequence, cuts it before it writes
// other tokens, and gets new physical blocks for what it writes.
class Twins {
 public:
  Twins(std::uint32_t seed, std::int64_t block_tokens, std::int64_t ranges, PrefixPolicy policy)
      : random_(seed),
        block_tokens_(block_tokens),
        ranges_(ranges),
        policy_(policy),
        index_(block_tokens, ranges, policy),
        model_(block_tokens, ranges) {
    for (const char* name : {"one", "another"}) index_.Namespace(name);
    index_.RecordEvents(1 + seed % 11);  // sometimes fewer than occur
  }

  void Step() {
    const std::int32_t slot = Below(kSlots);
    switch (Below(8)) {
      case 0:
        return Detach(slot);
      case 1:
        return Cut(slot);
      case 2:
        return Evict();
      case 3:
        return Touch();
      default:
        return Store(slot);
    }
  }

  void Check() {
    for (int i = 0; i < 3; ++i) {
      const std::int32_t space = Below(2);
      const Tokens tokens = Sought(space);
      const PrefixMatch found = index_.Find(space, tokens.data(), static_cast<std::int64_t>(tokens.size()));
      const PrefixMatch expected = model_.Find(space, tokens);
      ASSERT_EQ(found.tokens, expected.tokens);
      ASSERT_EQ(found.blocks, expected.blocks);
      ASSERT_EQ(found.owners, expected.owners);
      ASSERT_EQ(found.behind, expected.behind);
      ASSERT_EQ(found.leaf, expected.leaf);
    }
    ASSERT_EQ(references_, model_.Blocks());
    CheckEvents();
    std::int64_t tokens = 0;
    for (const auto& [key, entry] : model_.entries()) tokens += key.second.size() - model_.Depth(key) * block_tokens_;
    ASSERT_EQ(index_.numbers().tokens, tokens);
    ASSERT_EQ(index_.numbers().entries, static_cast<std::int64_t>(model_.entries().size()));
    for (std::int32_t slot = 0; slot < kSlots; ++slot) {
      // After removing one of a block's entries, the index may forget the block's tokens until they are stored again.
      Slot& state = slots_[slot];
      state.known = std::min(state.known, model_.Longest(state.space, state.tokens));
      ASSERT_LE(index_.Tokens(slot), state.known);
      ASSERT_GE(index_.Tokens(slot), state.known / block_tokens_ * block_tokens_);
    }
  }

 private:
  struct Slot {
    std::int32_t space = 0;
    Tokens tokens;
    std::int64_t known = 0;  // the number of these that the index has known throughout
    std::vector<std::int32_t> map;
    bool live = true;  // its entries stay
  };

  std::int32_t Below(std::int64_t bound) { return static_cast<std::int32_t>(random_() % bound); }

  // Returns tokens that mostly are, or continue, something stored.
  Tokens Sought(std::int32_t space) {
    Tokens tokens;
    if (!model_.entries().empty() && Below(4) > 0) {
      const auto place = std::next(model_.entries().begin(), Below(model_.entries().size()));
      if (place->first.first == space) tokens = place->first.second;
      tokens.resize(tokens.size() - Below(tokens.size() + 1));
    }
    for (std::int32_t more = Below(2 * block_tokens_); more > 0; --more) tokens.push_back(Below(2) - 1);
    return tokens;
  }

  // Checks that the events, replayed from the start, give the full blocks.
  void CheckEvents() {
    if (Below(3) > 0) return;
    for (const PrefixEvent& event : index_.TakeEvents()) {
      switch (event.kind) {
        case PrefixEvent::Kind::kCleared:
          replayed_.clear();
          break;
        case PrefixEvent::Kind::kRemoved:
          ASSERT_EQ(replayed_.erase(event.hash), 1u);
          break;
        case PrefixEvent::Kind::kStored: {
          PrefixModel::Key key(event.space, {});
          if (event.parent != 0) {
            ASSERT_EQ(replayed_.count(event.parent), 1u);
            key = replayed_[event.parent];
          }
          ASSERT_EQ(key.first, event.space);
          key.second.insert(key.second.end(), event.tokens.begin(), event.tokens.end());
          ASSERT_TRUE(replayed_.emplace(event.hash, key).second);
        }
      }
    }
    std::set<PrefixModel::Key> whole, replayed;
    for (const auto& [hash, key] : replayed_) replayed.insert(key);
    for (const auto& [key, entry] : model_.entries()) {
      if (static_cast<std::int64_t>(key.second.size()) % block_tokens_ == 0) whole.insert(key);
    }
    ASSERT_EQ(replayed, whole);
  }

  void Store(std::int32_t slot) {
    Slot& state = slots_[slot];
    if (state.tokens.empty()) {
      state.space = Below(2);
      state.tokens = Sought(state.space);
      state.live = true;
    } else {
      for (std::int32_t more = Below(2 * block_tokens_); more > 0; --more) state.tokens.push_back(Below(2) - 1);
    }
    const std::size_t blocks = (state.tokens.size() + block_tokens_ - 1) / block_tokens_ * ranges_;
    while (state.map.size() < blocks) state.map.push_back(next_block_++);
    std::vector<std::int32_t> referenced;
    index_.Store(slot, state.space, state.tokens.data(), static_cast<std::int64_t>(state.tokens.size()),
                 state.map.data(), &referenced);
    references_.insert(referenced.begin(), referenced.end());
    model_.Store(slot, state.space, state.tokens, state.map);
    state.known = static_cast<std::int64_t>(state.tokens.size());
    ASSERT_EQ(index_.Tokens(slot), state.known);
  }
  void Cut(std::int32_t slot) {
    Slot& state = slots_[slot];
    const std::int64_t tokens = Below(3) == 0 ? 0 : Below(state.tokens.size() + 1);
    const std::int64_t keep = Below(2) == 0 ? 0 : Below(state.tokens.size() / block_tokens_ + 2);
    std::vector<std::int32_t> dropped;
    index_.Cut(slot, tokens, keep, &dropped);
    Drop(dropped);
    model_.Cut(slot, tokens, keep);
    state.tokens.resize(tokens);
    // From the first rewritten block on, the slot gets new blocks; others keep the old ones.
    state.map.resize(std::min<std::size_t>(state.map.size(), tokens / block_tokens_ * ranges_));
    const std::size_t blocks = (tokens + block_tokens_ - 1) / block_tokens_ * ranges_;
    while (state.map.size() < blocks) state.map.push_back(next_block_++);
  }
  void Detach(std::int32_t slot) {
    index_.Detach(slot);
    model_.Detach(slot);
    slots_[slot] = Slot();
    ASSERT_EQ(index_.Tokens(slot), 0);
  }
  void Touch() {
    const std::int32_t space = Below(2);
    const Tokens tokens = Sought(space);
    index_.Touch(space, tokens.data(), static_cast<std::int64_t>(tokens.size()));
    model_.Touch(space, tokens);
  }
  void Evict() {
    for (Slot& slot : slots_) slot.live = Below(3) > 0;
    const std::int64_t enough = Below(3) == 0 ? kAll : Below(6);
    const auto frees = [&](std::int32_t owner) { return owner >= 0 && slots_[owner].live ? -1 : ranges_; };
    std::int64_t freed;
    const auto plan =
        index_.PlanEviction(enough, [&](const std::int32_t*, std::int32_t owner) { return frees(owner); }, &freed);
    std::vector<std::int32_t> dropped;
    index_.Evict(plan, &dropped);
    ASSERT_EQ(static_cast<std::int64_t>(dropped.size()), static_cast<std::int64_t>(plan.size()) * ranges_);
    ASSERT_EQ(static_cast<std::int64_t>(dropped.size()), freed);
    for (std::size_t i = 0; i < plan.size(); ++i) {
      ASSERT_LT(static_cast<std::int64_t>(i) * ranges_, enough);  // no more than needed
      const PrefixModel::Key* evicted = nullptr;
      std::int64_t oldest = kAll, last = 0;
      for (const auto& [key, entry] : model_.entries()) {
        if (frees(entry.owner) >= 0 && model_.Leaf(key)) oldest = std::min(oldest, entry.last);
        if (entry.blocks[0] != dropped[i * ranges_]) continue;
        evicted = &key;
        last = entry.last;
      }
      ASSERT_NE(evicted, nullptr);
      ASSERT_TRUE(model_.Leaf(*evicted));
      if (policy_ == PrefixPolicy::kLru) {
        ASSERT_EQ(last, oldest);
      }
      model_.Remove(PrefixModel::Key(*evicted));
    }
    if (freed < enough) {
      for (const auto& [key, entry] : model_.entries()) ASSERT_FALSE(frees(entry.owner) >= 0 && model_.Leaf(key));
    }
    Drop(dropped);
  }
  void Drop(const std::vector<std::int32_t>& dropped) {
    for (const std::int32_t block : dropped) {
      const auto place = references_.find(block);
      ASSERT_NE(place, references_.end());
      references_.erase(place);
    }
  }

  std::mt19937 random_;
  const std::int64_t block_tokens_, ranges_;
  const PrefixPolicy policy_;
  PrefixIndex index_;
  PrefixModel model_;
  Slot slots_[kSlots];
  std::multiset<std::int32_t> references_;
  std::map<std::uint64_t, PrefixModel::Key> replayed_;  // from events
  std::int32_t next_block_ = 0;
};

constexpr PrefixPolicy kPolicies[] = {PrefixPolicy::kLru, PrefixPolicy::kSegmentedLru, PrefixPolicy::kFrequency};

TEST(PrefixIndexTest, RandomOperationsAgreeWithTheModel) {
  for (std::uint32_t seed = 0; seed < 60; ++seed) {
    Twins twins(seed, 1 + seed % 5, 1 + seed % 3, kPolicies[seed / 5 % 3]);
    for (int step = 0; step < 400; ++step) {
      twins.Step();
      if (!HasFatalFailure()) twins.Check();
      ASSERT_FALSE(HasFatalFailure()) << "seed " << seed << ", step " << step;
    }
  }
}

TEST(PrefixIndexTest, ABlockHasOneEntryThoughItsSharersKnowDifferentNumbersOfTokens) {
  PrefixIndex index(/*block_tokens=*/4, /*ranges=*/2);
  const std::int32_t space = index.Namespace("");
  const Tokens tokens = {7, 7, 7, 7, 8};
  const std::vector<std::int32_t> map = {5, 6, 9, 10};
  std::set<std::int32_t> cached;
  const auto store = [&](std::int32_t slot, std::int64_t count) {
    std::vector<std::int32_t> referenced, dropped;
    index.Store(
        slot, space, tokens.data(), count, map.data(), &referenced, kAll,
        [&](std::int32_t block) { return cached.count(block) > 0; }, &dropped);
    cached.insert(referenced.begin(), referenced.end());
    return std::make_pair(referenced, dropped);
  };
  // A failed program has left the first slot with 2 tokens of a block that another slot shares with 4.
  EXPECT_EQ(store(0, 2), std::make_pair(Tokens({5, 6}), Tokens()));
  EXPECT_EQ(store(1, 5), std::make_pair(Tokens({5, 6, 9, 10}), Tokens({5, 6})));
  EXPECT_EQ(index.numbers().entries, 2);
  EXPECT_EQ(index.numbers().tokens, 5);
  EXPECT_EQ(index.Tokens(0), 0);
  EXPECT_FALSE(index.Owns(0, 0));
  EXPECT_EQ(store(0, 2), std::make_pair(Tokens(), Tokens()));  // found in the other slot's entry
  EXPECT_EQ(index.Tokens(0), 2);
  EXPECT_EQ(index.Find(space, tokens.data(), 5).blocks, map);
}

TEST(PrefixIndexTest, LongPromptsMatchAcrossWindowsOfTheWalk) {
  PrefixIndex index(2, 1);
  const std::int32_t space = index.Namespace("");
  Tokens tokens(1000), map(500), referenced;
  std::iota(tokens.begin(), tokens.end(), -500);
  index.Store(0, space, tokens.data(), 1000, map.data(), &referenced);
  EXPECT_EQ(index.Find(space, tokens.data(), 1000).tokens, 1000);
  for (const std::int64_t changed : {0, 1, 31, 32, 33, 500, 999}) {
    Tokens other = tokens;
    other[changed] = 1 << 30;
    EXPECT_EQ(index.Find(space, other.data(), 1000).tokens, changed);
  }
  EXPECT_EQ(index.numbers().entries, 500);
}

}  // namespace
}  // namespace kvpage::testing
