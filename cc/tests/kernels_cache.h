// Caches of every layout for the kernel tests, poisoned with NaN.
#ifndef KVPAGE_TESTS_KERNELS_CACHE_H_
#define KVPAGE_TESTS_KERNELS_CACHE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "base/kv_view.h"

namespace kvpage::testing {

using Rng = std::mt19937_64;

inline int Pick(Rng& rng, int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
template <class T>
T PickOf(Rng& rng, std::initializer_list<T> values) {
  return values.begin()[Pick(rng, 0, static_cast<int>(values.size()) - 1)];
}

// kTableApart: values are in different chunks than their keys, at no fixed distance.
enum class Layout { kFused, kPerLayer, kTableNhd, kTableHnd, kTableApart };

inline bool HasTable(Layout layout) { return layout != Layout::kFused && layout != Layout::kPerLayer; }

// Room for `slots` contexts of `max_tokens`, all of it NaN until something is written.
struct Cache {
  std::vector<char> memory;
  std::vector<std::int32_t> table;
  KVView view;
  std::int64_t layer = 0;

  Cache(Rng& rng, Layout layout, DType dtype, int heads, int head_dim, int slots, int max_tokens, int chunk) {
    const auto item = static_cast<std::int64_t>(ItemSize(dtype));
    const std::int64_t chunks = (max_tokens + chunk - 1) / chunk;
    const int layers = HasTable(layout) ? 1 : 3;
    layer = layers == 3 ? 1 : 0;
    view.dtype = dtype;
    view.num_kv_heads = heads;
    view.head_dim = head_dim;
    view.tokens_per_chunk = chunk;
    const auto scale = static_cast<std::int64_t>(ScaleSize(dtype));
    // The keys or values of one layer in a chunk, followed by their scales.
    const std::int64_t data = heads * chunk * head_dim * item;
    view.scale_base = scale == 0 ? data : (data + 3) / 4 * 4;
    const std::int64_t plane = view.scale_base + heads * chunk * scale;
    const std::int64_t all = slots * chunks * plane;
    const bool head_major = layout == Layout::kFused || layout == Layout::kTableHnd;
    view.token_stride = head_major ? head_dim * item : heads * head_dim * item;
    view.head_stride = head_major ? chunk * head_dim * item : head_dim * item;
    view.scale_token_stride = head_major ? scale : heads * scale;
    view.scale_head_stride = head_major ? chunk * scale : scale;
    if (layout == Layout::kFused) {
      view.kv_stride = plane;
      view.layer_stride = 2 * plane;
      view.chunk_stride = layers * 2 * plane;
      view.slot_stride = chunks * view.chunk_stride;
    } else {
      view.chunk_stride = plane;
      view.slot_stride = chunks * plane;
      view.kv_stride = all;
      view.layer_stride = 2 * all;
    }
    memory.resize(layers * 2 * all);
    std::memset(memory.data(), 0xff, memory.size());  // NaN in every dtype but int8, whose scales are
    view.base = memory.data();
    if (layout == Layout::kTableApart) {
      view.kv_stride = 0;
      view.table_kv_stride = chunks;
    }
    if (HasTable(layout)) {
      const std::int64_t kinds = layout == Layout::kTableApart ? 2 : 1;
      table.resize(slots * kinds * chunks);
      std::iota(table.begin(), table.end(), 0);
      std::shuffle(table.begin(), table.end(), rng);
      view.table = table.data();
      view.table_width = kinds * chunks;
    }
  }

  char* At(int slot, std::int64_t token, int which, int head, int d = 0) const {
    return view.At(slot, token, layer, which, head) + d * ItemSize(view.dtype);
  }
  float* ScaleAt(int slot, std::int64_t token, int which, int head) const {
    return view.Scale(slot, token, layer, which, head);
  }
};

}  // namespace kvpage::testing

#endif  // KVPAGE_TESTS_KERNELS_CACHE_H_
