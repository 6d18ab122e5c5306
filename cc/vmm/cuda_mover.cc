#include "vmm/cuda_mover.h"

#include <utility>

namespace kvpage {
namespace {

std::string OfABlock(std::int64_t bytes) { return std::to_string(bytes) + " bytes of a block"; }

}  // namespace

Status CudaMover::Make(std::shared_ptr<const CudaContext> context, std::shared_ptr<BlockMover>* out) {
  const ContextScope scope(*context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  // Owned from here on, so that an early return destroys its streams.
  const std::shared_ptr<CudaMover> mover(new CudaMover(std::move(context)));
  for (Lane* const lane : {&mover->to_host_, &mover->to_block_}) {
    KVPAGE_CU(mover->driver(), StreamCreate, "for copies of blocks", &lane->stream, cu::kStreamNonBlocking);
  }
  *out = mover;
  return {};
}

CudaMover::~CudaMover() {
  const ContextScope scope(*context_);
  if (!scope.status().ok()) return;
  for (const Lane* const lane : {&to_host_, &to_block_}) {
    if (lane->stream != nullptr) static_cast<void>(driver().StreamDestroy(lane->stream));
  }
}

Status CudaMover::Run(Lane* lane, const std::function<Status(cu::Stream)>& queue) {
  const std::lock_guard<std::mutex> lock(lane->mutex);
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const UncapturedScope uncaptured(driver());
  Status status = queue(lane->stream);
  // Wait even after an error: the caller may free the memory of copies that were queued before it.
  const cu::Result done = driver().StreamSynchronize(lane->stream);
  if (!status.ok() || done == cu::Result::kSuccess) return status;
  return driver().Explain(done, cu::Call::kStreamSynchronize, "after copies of blocks");
}

Status CudaMover::Copy(const std::vector<ToHost>& copies, std::int64_t bytes) {
  return Run(&to_host_, [&](cu::Stream stream) -> Status {
    for (const ToHost& copy : copies) {
      KVPAGE_CU(driver(), MemcpyDtoHAsync, OfABlock(bytes), copy.host, reinterpret_cast<cu::DevicePtr>(copy.block),
                static_cast<std::size_t>(bytes), stream);
    }
    return {};
  });
}

Status CudaMover::Copy(const std::vector<ToBlock>& copies, std::int64_t bytes) {
  return Run(&to_block_, [&](cu::Stream stream) -> Status {
    for (const ToBlock& copy : copies) {
      KVPAGE_CU(driver(), MemcpyHtoDAsync, OfABlock(bytes), reinterpret_cast<cu::DevicePtr>(copy.block), copy.host,
                static_cast<std::size_t>(bytes), stream);
    }
    return {};
  });
}

Status CudaMover::MakeBuffer(std::int64_t bytes, std::shared_ptr<char>* out) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const UncapturedScope uncaptured(driver());
  void* data = nullptr;
  KVPAGE_CU(driver(), MemHostAlloc, OfABlock(bytes), &data, static_cast<std::size_t>(bytes), cu::kHostAllocPortable);
  out->reset(static_cast<char*>(data), [context = context_](char* memory) {
    const ContextScope freeing(*context);
    if (!freeing.status().ok()) return;
    const UncapturedScope anywhere(context->driver());
    static_cast<void>(context->driver().MemFreeHost(memory));
  });
  return {};
}

}  // namespace kvpage
