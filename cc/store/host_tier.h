// HostTier: the evicted prefixes of one pool in a HostStore, removed when the pool ends.
#ifndef KVPAGE_STORE_HOST_TIER_H_
#define KVPAGE_STORE_HOST_TIER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "store/host_store.h"
#include "store/prefix_store.h"

namespace kvpage::store {

class HostTier final : public PrefixStore {
 public:
  // The store must be open.
  explicit HostTier(std::shared_ptr<HostStore> store)
      : store_(std::move(store)), owner_(store_->prefixes().NewOwner()) {}
  ~HostTier() override { Forget(); }
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;

  Status Check(const char* op) const override { return store_->Check(op); }
  bool copies() const override { return true; }
  std::string Explain(Problem problem) const override {
    if (problem == Problem::kUnreadable) return "a copy from host memory has failed";
    if (problem == Problem::kGone) return "the others have been evicted from host memory";
    return std::string("the store is ") + Name(problem);
  }
  std::int64_t Find(const BlockShape& shape, const std::string& space, const std::int32_t* tokens,
                    std::int64_t count) override {
    if (!Check("find").ok()) return 0;
    return store_->prefixes().StoredBlocks({shape, owner_, space}, tokens, count) * shape.block_tokens;
  }
  std::int64_t StoredBlocks(const BlockShape& shape, const std::string& space,
                            const std::vector<std::int32_t>& tokens) override {
    if (!Check("find").ok()) return 0;
    const auto count = static_cast<std::int64_t>(tokens.size());
    return store_->prefixes().StoredBlocks({shape, owner_, space}, tokens.data(), count);
  }
  std::vector<StoredRun> Lost(const BlockShape& shape, std::int64_t* seen) override {
    return Check("lost").ok() ? store_->prefixes().Lost(shape, owner_, seen) : std::vector<StoredRun>();
  }
  bool Write(WriteRun& run) override { return Check("write").ok() && store_->prefixes().Write(owner_, run); }
  void Fetch(ReadRequest request) override {
    if (Check("prefetch").ok()) return store_->prefixes().Read(owner_, std::move(request));
    if (request.done) request.done(0, Problem::kClosed);
  }
  double read_bytes_per_second() override {
    return Check("stats").ok() ? store_->prefixes().read_bytes_per_second() : 0;
  }
  void Leave() override { Forget(); }

 private:
  void Forget() const {
    if (store_->here()) store_->prefixes().Forget(owner_);
  }

  const std::shared_ptr<HostStore> store_;
  const std::string owner_;  // owner name in the store
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_HOST_TIER_H_
