// EvictionPolicy: what an entry of the prefix index is worth. The index evicts leaves only, those with the smallest
// value first, so that a prefix stays as long as something continues it.
#ifndef KVPAGE_CACHE_EVICTION_POLICY_H_
#define KVPAGE_CACHE_EVICTION_POLICY_H_

#include <cstdint>
#include <memory>
#include <vector>

namespace kvpage {

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A request begins: what is touched and stored until the next one happens at one time.
  virtual void NextRequest() = 0;
  virtual void Stored(std::int32_t entry) = 0;
  virtual void Touched(std::int32_t entry) = 0;
  // What an entry is worth, compared with other entries. It changes with calls that name the entry only.
  virtual double Value(std::int32_t entry) const = 0;
};

// Least recently used.
std::unique_ptr<EvictionPolicy> MakeLru();

}  // namespace kvpage

#endif  // KVPAGE_CACHE_EVICTION_POLICY_H_
