// WrittenRuns: the number of written tokens of a slot in each layer, compact enough for a fault record: layers in
// order, with adjacent layers that have the same number of tokens merged into a run. One forgotten layer makes at most
// three runs.
#ifndef KVPAGE_BASE_WRITTEN_RUNS_H_
#define KVPAGE_BASE_WRITTEN_RUNS_H_

#include <cstdint>

#include "base/host_device.h"

namespace kvpage {

struct WrittenRuns {
  static constexpr int kMost = 4;
  std::int32_t count = 0;               // total number of runs; only the first kMost are listed
  std::int32_t last_layer[kMost] = {};  // per run
  std::int32_t tokens[kMost] = {};
};

// `written`: [num_layers] of one slot. At most `limit` tokens are counted per layer.
KVPAGE_HOST_DEVICE inline WrittenRuns FindWrittenRuns(const std::int32_t* written, std::int64_t num_layers,
                                                      std::int32_t limit) {
  WrittenRuns runs;
  std::int32_t last = -1;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    const std::int32_t tokens = written[layer] < limit ? written[layer] : limit;
    if (tokens != last) ++runs.count;
    last = tokens;
    if (runs.count > WrittenRuns::kMost) continue;
    runs.last_layer[runs.count - 1] = static_cast<std::int32_t>(layer);
    runs.tokens[runs.count - 1] = tokens;
  }
  return runs;
}

}  // namespace kvpage

#endif  // KVPAGE_BASE_WRITTEN_RUNS_H_
