#include "cache/eviction_policy.h"

namespace kvpage {
namespace {

class Lru final : public EvictionPolicy {
 public:
  void NextRequest() override { ++now_; }
  void Stored(std::int32_t entry) override {
    if (entry >= static_cast<std::int64_t>(last_.size())) last_.resize(entry + 1);
    last_[entry] = now_;
  }
  void Touched(std::int32_t entry) override { last_[entry] = now_; }
  double Value(std::int32_t entry) const override { return last_[entry]; }

 private:
  double now_ = 0;
  std::vector<double> last_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeLru() { return std::make_unique<Lru>(); }

}  // namespace kvpage
