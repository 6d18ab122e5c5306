#include "vmm/cuda_vmm.h"

#include <algorithm>
#include <string>
#include <utility>

#include "vmm/cuda_mover.h"

namespace kvpage {
namespace {

std::string OfBytes(std::int64_t bytes) { return "of " + std::to_string(bytes) + " bytes"; }

// Places after the virtual range: for a block that is copied, and for its copy.
constexpr std::int64_t kCopyPlaces = 2;

Status Worse(const Status& status, const Status& rollback) {
  return Internal(status.message() + "; putting back what was done before failed too (" + rollback.message() +
                  "): close the pool and make a new one");
}

}  // namespace

CudaVmm::CudaVmm(std::shared_ptr<const CudaContext> context, std::int64_t block_bytes, std::int64_t device_bytes)
    : context_(std::move(context)),
      block_bytes_(block_bytes),
      device_bytes_(device_bytes),
      access_(*context_, &system_calls_),
      window_(*context_, &access_, block_bytes, &system_calls_),
      transit_(*context_, &access_, block_bytes, &system_calls_) {}

Status CudaVmm::Make(std::shared_ptr<const CudaContext> context, std::int64_t virtual_bytes, std::int64_t block_bytes,
                     std::unique_ptr<CudaVmm>* out) {
  const Driver& driver = context->driver();
  const int ordinal = context->ordinal();
  DeviceDescription device;
  KVPAGE_RETURN_IF_ERROR(DescribeDevice(driver, ordinal, &device));
  const std::string name = "device " + std::to_string(ordinal) + " (" + device.name + ")";
  if (!device.virtual_memory) {
    return FailedPrecondition(name + " has no virtual memory management (cuMemMap): use another device, or the CPU");
  }
  const std::int64_t granularity = device.granularity;
  if (block_bytes <= 0 || block_bytes % granularity != 0) {
    return InvalidArgument("block_bytes is " + std::to_string(block_bytes) + "; " + name +
                           " maps memory in whole multiples of " + std::to_string(granularity) +
                           " bytes: choose block_tokens accordingly, or leave it to spec.resolve(\"cuda\")");
  }
  if (virtual_bytes <= 0 || virtual_bytes % block_bytes != 0) {
    return InvalidArgument("virtual_bytes is " + std::to_string(virtual_bytes) + ", wanted a positive multiple of " +
                           std::to_string(block_bytes) + " (block_bytes)");
  }
  const ContextScope scope(*context);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  // Owned from here on, so that an early return frees it.
  std::unique_ptr<CudaVmm> vmm(new CudaVmm(std::move(context), block_bytes, device.total_bytes));
  if (device.posix_handles) vmm->handle_type_ = cu::HandleType::kPosixFileDescriptor;
  const std::int64_t reserved = virtual_bytes + kCopyPlaces * block_bytes;
  vmm->mapped_.assign(reserved / block_bytes, -1);
  vmm->Count(2);
  KVPAGE_CU(driver, StreamCreate, "", &vmm->stream_, cu::kStreamNonBlocking);
  cu::DevicePtr base = 0;
  KVPAGE_CU(driver, MemAddressReserve, OfBytes(reserved), &base, static_cast<std::size_t>(reserved),
            static_cast<std::size_t>(granularity), 0, 0);
  vmm->base_ = base;
  vmm->reserved_bytes_ = reserved;
  *out = std::move(vmm);
  return {};
}

CudaVmm::~CudaVmm() {
  if (abandoned_) return;
  // Errors cannot be reported any more; memory that the driver does not free stays until the process ends.
  const ContextScope scope(*context_);
  if (!scope.status().ok()) return;
  for (std::size_t place = 0; place < mapped_.size(); ++place) {
    if (mapped_[place] >= 0) static_cast<void>(UnmapOne(static_cast<std::int64_t>(place)));
  }
  window_.Free();
  transit_.Free();
  for (std::size_t block = 0; block < handles_.size(); ++block) {
    if (exists_[block]) static_cast<void>(driver().MemRelease(handles_[block]));
  }
  if (reserved_bytes_ > 0) static_cast<void>(driver().MemAddressFree(base_, static_cast<std::size_t>(reserved_bytes_)));
  if (stream_ != nullptr) static_cast<void>(driver().StreamDestroy(stream_));
}

Status CudaVmm::Grow(std::int64_t num_blocks) {
  if (num_blocks <= static_cast<std::int64_t>(handles_.size())) return {};
  if (window_.reserved() && num_blocks > window_.capacity()) {
    return FailedPrecondition("the block window has room for " + std::to_string(window_.capacity()) + " blocks " +
                              OfBytes(block_bytes_) + ", more than the device's memory: " + std::to_string(num_blocks) +
                              " wanted: give a smaller capacity");
  }
  handles_.resize(num_blocks, 0);
  exists_.resize(num_blocks, false);
  places_.resize(num_blocks, 0);
  read_only_.resize(num_blocks, false);
  return {};
}

Status CudaVmm::Window(char** out) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const auto blocks = static_cast<std::int64_t>(handles_.size());
  if (!window_.reserved()) {
    KVPAGE_RETURN_IF_ERROR(window_.Reserve(std::max({blocks, device_bytes_ / block_bytes_, std::int64_t{1}})));
  }
  std::vector<std::int32_t> created;
  for (std::int64_t block = 0; block < blocks; ++block) {
    if (exists_[block]) created.push_back(static_cast<std::int32_t>(block));
  }
  Status status = window_.Map(created.data(), static_cast<std::int64_t>(created.size()), handles_, read_only_);
  if (!status.ok()) {
    // Once a caller has its address, programs may be using the existing blocks.
    if (!window_given_) window_.Free();
    return status;
  }
  window_given_ = true;
  *out = window_.base();
  return {};
}

Status CudaVmm::CreateOne(std::int32_t block) {
  cu::AllocationProp prop;
  prop.location.id = context_->device();
  prop.handle_type = handle_type_;
  const auto create = [&] {
    Count();
    return driver().MemCreate(&handles_[block], static_cast<std::size_t>(block_bytes_), &prop, 0);
  };
  cu::Result result = create();
  // In some containers exporting memory is forbidden although the device reports support.
  if (num_handles_ == 0 && shareable() && result != cu::Result::kSuccess && result != cu::Result::kOutOfMemory) {
    prop.handle_type = cu::HandleType::kNone;
    if (create() == cu::Result::kSuccess) {
      handle_type_ = prop.handle_type;
      result = cu::Result::kSuccess;
    }
  }
  if (result != cu::Result::kSuccess) return driver().Explain(result, cu::Call::kMemCreate, OfBytes(block_bytes_));
  exists_[block] = true;
  ++num_handles_;
  return {};
}

Status CudaVmm::ReleaseOne(std::int32_t block) {
  // A failed rollback can leave a block mapped where the caller sees a hole. The driver would then release the handle
  // but keep the memory.
  for (std::size_t place = 0; places_[block] > 0 && place < mapped_.size(); ++place) {
    if (mapped_[place] == block) KVPAGE_RETURN_IF_ERROR(UnmapOne(static_cast<std::int64_t>(place)));
  }
  KVPAGE_RETURN_IF_ERROR(window_.Unmap(block));
  KVPAGE_RETURN_IF_ERROR(transit_.Clear());
  Count();
  KVPAGE_CU(driver(), MemRelease, OfBytes(block_bytes_), handles_[block]);
  exists_[block] = read_only_[block] = false;
  --num_handles_;
  lent_.Remove(block);
  received_.erase(block);
  return {};
}

Status CudaVmm::Create(const std::int32_t* blocks, std::int64_t count) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  std::vector<std::int32_t> created;
  for (std::int64_t i = 0; i < count; ++i) {
    // Left over from a failed Destroy and reusable, or from a failed Return and not to be reused.
    Status status = exists_[blocks[i]] && given(blocks[i]) ? ReleaseOne(blocks[i]) : Status();
    if (exists_[blocks[i]] && status.ok()) continue;
    if (status.ok()) status = CreateOne(blocks[i]);
    if (!status.ok()) {
      for (std::int32_t block : created) static_cast<void>(ReleaseOne(block));
      return status.WithMessage("creating block " + std::to_string(i + 1) + " of " + std::to_string(count) + ": " +
                                status.message());
    }
    created.push_back(blocks[i]);
  }
  if (!window_.reserved()) return {};
  Status status = window_.Map(blocks, count, handles_, read_only_);
  if (status.ok()) return {};
  for (std::int32_t block : created) static_cast<void>(ReleaseOne(block));
  return status;
}

Status CudaVmm::Destroy(const std::int32_t* blocks, std::int64_t count) {
  if (count == 0) return {};
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  Status first;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!exists_[blocks[i]]) continue;
    Status status = ReleaseOne(blocks[i]);
    if (first.ok()) first = std::move(status);
  }
  return first;
}

Status CudaVmm::MapOne(std::int64_t place, std::int32_t block) {
  // A failed rollback may have left a mapping here.
  if (mapped_[place] >= 0) KVPAGE_RETURN_IF_ERROR(UnmapOne(place));
  Count();
  const auto bytes = static_cast<std::size_t>(block_bytes_);
  const cu::Result result = driver().MemMap(Address(place), bytes, 0, handles_[block], 0);
  if (result == cu::Result::kInvalidValue && received_.count(block) > 0) return CudaTransit::WrongSize(block_bytes_);
  if (result != cu::Result::kSuccess) return driver().Explain(result, cu::Call::kMemMap, OfBytes(block_bytes_));
  mapped_[place] = block;
  ++places_[block];
  return {};
}

Status CudaVmm::UnmapOne(std::int64_t place) {
  Count();
  KVPAGE_CU(driver(), MemUnmap, OfBytes(block_bytes_), Address(place), static_cast<std::size_t>(block_bytes_));
  --places_[mapped_[place]];
  mapped_[place] = -1;
  return {};
}

Status CudaVmm::SetAccess(std::int64_t place, std::int64_t count) {
  for (std::int64_t begin = 0, end = 0; begin < count; begin = end) {
    const bool reads = read_only_[mapped_[place + begin]];
    for (end = begin + 1; end < count && read_only_[mapped_[place + end]] == reads;) ++end;
    const std::int64_t bytes = (end - begin) * block_bytes_;
    KVPAGE_RETURN_IF_ERROR(access_.Grant(Address(place + begin), bytes, reads, OfBytes(bytes)));
  }
  return {};
}

bool CudaVmm::IsMapped(std::int64_t place, const std::int32_t* blocks, std::int64_t count) const {
  return std::equal(blocks, blocks + count, mapped_.begin() + place);
}

Status CudaVmm::MapRun(std::int64_t place, const std::int32_t* blocks, std::int64_t count) {
  if (IsMapped(place, blocks, count)) return SetAccess(place, count);
  Status status;
  std::int64_t done = 0;
  while (done < count && (status = MapOne(place + done, blocks[done])).ok()) ++done;
  if (status.ok()) status = SetAccess(place, count);
  if (status.ok()) return {};
  // Mappings that cannot be unmapped now stay in mapped_, for the next Map of the place or the destructor.
  for (std::int64_t i = 0; i < done; ++i) static_cast<void>(UnmapOne(place + i));
  return status.WithMessage("mapping " + std::to_string(count) + " blocks: " + status.message());
}

Status CudaVmm::Map(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  if (count == 0) return {};
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  return MapRun(offset / block_bytes_, blocks, count);
}

Status CudaVmm::MapReadOnly(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  return IsMapped(offset / block_bytes_, blocks, count) ? Status() : Map(offset, blocks, count);
}

Status CudaVmm::Unmap(std::int64_t offset, const std::int32_t* blocks, std::int64_t count) {
  if (count == 0) return {};
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const std::int64_t place = offset / block_bytes_;
  for (std::int64_t i = 0; i < count; ++i) {
    Status status = UnmapOne(place + i);
    if (status.ok()) continue;
    if (Status rollback = i > 0 ? MapRun(place, blocks, i) : Status(); !rollback.ok()) return Worse(status, rollback);
    return status.WithMessage("unmapping " + std::to_string(count) + " blocks: " + status.message());
  }
  return {};
}

Status CudaVmm::Remap(std::int64_t offset, const std::int32_t* old_blocks, const std::int32_t* blocks,
                      std::int64_t count) {
  if (std::equal(blocks, blocks + count, old_blocks)) return {};  // they are already mapped for writing
  KVPAGE_RETURN_IF_ERROR(Unmap(offset, old_blocks, count));
  Status status = Map(offset, blocks, count);
  if (status.ok()) return {};
  if (Status rollback = Map(offset, old_blocks, count); !rollback.ok()) return Worse(status, rollback);
  return status;
}

Status CudaVmm::CopyOne(std::int32_t from, std::int32_t to) {
  const std::int64_t place = static_cast<std::int64_t>(mapped_.size()) - kCopyPlaces;
  const std::int32_t blocks[kCopyPlaces] = {from, to};
  KVPAGE_RETURN_IF_ERROR(MapRun(place, blocks, kCopyPlaces));
  const auto copy = [&]() -> Status {
    Count(2);
    KVPAGE_CU(driver(), MemcpyDtoDAsync, OfBytes(block_bytes_), Address(place + 1), Address(place),
              static_cast<std::size_t>(block_bytes_), stream_);
    KVPAGE_CU(driver(), StreamSynchronize, "after copying a block", stream_);
    return {};
  };
  Status status = copy();
  for (std::int64_t i = 0; i < kCopyPlaces; ++i) {
    // A mapping that remains is removed by the next copy.
    if (Status unmapped = UnmapOne(place + i); status.ok()) status = unmapped;
  }
  return status;
}

Status CudaVmm::Copy(const std::int32_t* from, const std::int32_t* to, std::int64_t count) {
  if (count == 0) return {};
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  for (std::int64_t i = 0; i < count; ++i) KVPAGE_RETURN_IF_ERROR(CopyOne(from[i], to[i]));
  return {};
}

Status CudaVmm::Mover(std::shared_ptr<BlockMover>* out) {
  if (mover_ == nullptr) {
    Count(2);
    KVPAGE_RETURN_IF_ERROR(CudaMover::Make(context_, &mover_));
  }
  *out = mover_;
  return {};
}

Status CudaVmm::Fill(std::int64_t offset, std::int64_t bytes, int byte) {
  if (bytes == 0) return {};
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  Count(2);
  KVPAGE_CU(driver(), MemsetD8Async, OfBytes(bytes), base_ + static_cast<cu::DevicePtr>(offset),
            static_cast<unsigned char>(byte), static_cast<std::size_t>(bytes), stream_);
  KVPAGE_CU(driver(), StreamSynchronize, "after filling " + std::to_string(bytes) + " bytes", stream_);
  return {};
}

}  // namespace kvpage
