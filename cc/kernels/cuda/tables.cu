// Checks the lengths, offsets and block tables of attention over plain page arrays. There is no pool and no fault
// record: an invalid sequence gets NaN.
#include "kernels/cuda/check.cuh"

namespace kvpage::cuda {
namespace {

constexpr int kThreads = 128;

// One block per sequence; the first one checks all offsets too.
__global__ void __launch_bounds__(kThreads)
    TableCheckKernel(const __grid_constant__ KVView view, std::int64_t num_pages, const std::int32_t* lengths,
                     const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                     const std::int32_t* window, CheckedBatch* checked) {
  LetNextKernelStart();
  if (blockIdx.x == 0) {
    int wrong = offsets[0] != 0 || offsets[num_sequences] > num_tokens;
    for (std::int64_t s = threadIdx.x; s < num_sequences; s += blockDim.x) wrong |= offsets[s + 1] < offsets[s];
    wrong = __syncthreads_or(wrong);
    if (threadIdx.x == 0) {
      checked->ok = wrong == 0 ? 1 : 0;
      checked->layer = 0;
      checked->num_sequences = static_cast<std::int32_t>(num_sequences);
      checked->sliding_window = window != nullptr ? *window : 0;
      checked->groups_hold = 1;  // the plan is made from this view, in the same call
      checked->view = view;
      checked->readers = nullptr;
    }
  }
  const std::int64_t s = blockIdx.x;
  if (s >= num_sequences) return;
  Sequence sequence;
  sequence.slot = -1;
  sequence.query_begin = offsets[s];
  // The offsets may be invalid, so this difference may not fit into an int32.
  const std::int64_t length = lengths[s], queries = std::int64_t{offsets[s + 1]} - offsets[s];
  sequence.query_length = static_cast<std::int32_t>(queries);
  if (queries > 0 && length > 0) {
    const std::int64_t pages = CeilDiv(length, view.tokens_per_chunk);
    int wrong = length < queries || pages > view.table_width;
    if (wrong == 0) {
      for (std::int64_t p = threadIdx.x; p < pages; p += blockDim.x) {
        const std::int32_t page = view.table[s * view.table_width + p];
        wrong |= page < 0 || page >= num_pages;
      }
    }
    wrong = __syncthreads_or(wrong);
    sequence.slot = wrong == 0 ? static_cast<std::int32_t>(s) : kWrongSequence;
    sequence.position = static_cast<std::int32_t>(length - queries);
  }
  if (threadIdx.x == 0) checked->sequences()[s] = sequence;
}

}  // namespace

Status LaunchTableCheck(const KVView& view, std::int64_t num_pages, const std::int32_t* lengths,
                        const std::int32_t* offsets, std::int64_t num_sequences, std::int64_t num_tokens,
                        const std::int32_t* window, void* checked, Stream stream) {
  const LaunchShape shape = {static_cast<unsigned>(num_sequences > 0 ? num_sequences : 1), kThreads, 0, false};
  return Launch<TableCheckKernel>("table_check", shape, stream, view, num_pages, lengths, offsets, num_sequences,
                                  num_tokens, window, static_cast<CheckedBatch*>(checked));
}

}  // namespace kvpage::cuda
