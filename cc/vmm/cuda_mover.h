// CudaMover: copies blocks of a CUDA device to pinned memory and back, on one stream per direction.
//
// The streams are non-blocking and private: they wait for no program, and no program waits for them. Neither the
// context nor one of XLA's streams is synchronised, and graph captures are not disturbed in any thread.
#ifndef KVPAGE_VMM_CUDA_MOVER_H_
#define KVPAGE_VMM_CUDA_MOVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "vmm/block_mover.h"
#include "vmm/cuda_context.h"

namespace kvpage {

class CudaMover final : public BlockMover {
 public:
  static Status Make(std::shared_ptr<const CudaContext> context, std::shared_ptr<BlockMover>* out);
  ~CudaMover() override;
  CudaMover(const CudaMover&) = delete;
  CudaMover& operator=(const CudaMover&) = delete;

  Status Copy(const std::vector<ToHost>& copies, std::int64_t bytes) override;
  Status Copy(const std::vector<ToBlock>& copies, std::int64_t bytes) override;
  Status MakeBuffer(std::int64_t bytes, std::shared_ptr<char>* out) override;

 private:
  // Runs one batch of copies at a time.
  struct Lane {
    std::mutex mutex;
    cu::Stream stream = nullptr;
  };

  explicit CudaMover(std::shared_ptr<const CudaContext> context) : context_(std::move(context)) {}
  const Driver& driver() const { return context_->driver(); }
  // Waits for what `queue` has queued on the lane's stream, even if it has failed.
  Status Run(Lane* lane, const std::function<Status(cu::Stream)>& queue);

  const std::shared_ptr<const CudaContext> context_;
  Lane to_host_, to_block_;
};

}  // namespace kvpage

#endif  // KVPAGE_VMM_CUDA_MOVER_H_
