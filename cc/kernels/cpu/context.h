// Context: the keys, values and scales of some KV heads of one sequence in the form that the kernels read: a list of
// key addresses and a contiguous copy of the scales. Also prefetches both.
#ifndef KVPAGE_KERNELS_CPU_CONTEXT_H_
#define KVPAGE_KERNELS_CPU_CONTEXT_H_

#include <cstdint>

#include "base/kv_view.h"

namespace kvpage::cpu {

class Context {
 public:
  Context(const KVView& kv, std::int64_t layer, std::int32_t slot, int kv_head, int heads)
      : kv_(kv), layer_(layer), slot_(slot), kv_head_(kv_head), heads_(heads) {}

  int heads() const { return heads_; }
  // Appends the addresses of the first head's keys (kv = 0) or values (kv = 1) at positions [begin, end) to `rows`;
  // returns the end of the list.
  const char** List(int kv, std::int64_t begin, std::int64_t end, const char** rows) const;
  // Copies the scales at these positions into the layout of SpanArgs::scales.
  void LoadScales(std::int64_t begin, std::int64_t end, float* scales) const;
  void PrefetchKeys(std::int64_t begin, std::int64_t end) const;
  // Prefetching matters more for scales than for keys: scales are copied all at once, while the kernels prefetch keys.
  void PrefetchScales(std::int64_t begin, std::int64_t end) const;

 private:
  // First position of the next chunk, or end.
  std::int64_t ChunkEnd(std::int64_t token, std::int64_t end) const;

  const KVView& kv_;
  std::int64_t layer_;
  std::int32_t slot_;
  int kv_head_;
  int heads_;
};

}  // namespace kvpage::cpu

#endif  // KVPAGE_KERNELS_CPU_CONTEXT_H_
