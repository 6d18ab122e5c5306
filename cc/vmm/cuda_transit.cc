#include "vmm/cuda_transit.h"

#include <fcntl.h>

#include <string>
#include <utility>

namespace kvpage {
namespace {

constexpr int kFrom = 0, kTo = 1;  // indices of places

std::string OfABlock(std::int64_t bytes) { return "of a block of " + std::to_string(bytes) + " bytes"; }

// Descriptors run out first: there is one per block.
Status WithWayOut(const Status& status, cu::Result result) {
  if (result != cu::Result::kOperatingSystem) return status;
  return status.WithMessage(status.message() +
                            ": each block takes a file descriptor of the process: `ulimit -n` says how many it may "
                            "have, and raises that");
}

}  // namespace

Status CudaTransit::WrongSize(std::int64_t block_bytes) {
  return InvalidArgument("a descriptor is no allocation of " + std::to_string(block_bytes) +
                         " bytes, which a block of the pool has");
}

Status CudaTransit::Export(cu::MemHandle handle, Fd* out) {
  Count();
  int fd = -1;
  const cu::Result result = driver().MemExportToShareableHandle(&fd, handle, cu::HandleType::kPosixFileDescriptor, 0);
  if (result != cu::Result::kSuccess) {
    return WithWayOut(driver().Explain(result, cu::Call::kMemExportToShareableHandle, OfABlock(block_bytes_)), result);
  }
  out->Reset(fd);
  // Child processes must not keep the memory alive.
  static_cast<void>(fcntl(fd, F_SETFD, FD_CLOEXEC));
  return {};
}

Status CudaTransit::Import(int fd, cu::MemHandle* out) {
  Count();
  const cu::Result result = driver().MemImportFromShareableHandle(
      out, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)), cu::HandleType::kPosixFileDescriptor);
  if (result == cu::Result::kInvalidValue || result == cu::Result::kInvalidHandle ||
      result == cu::Result::kInvalidDevice) {
    const Status status = driver().Explain(result, cu::Call::kMemImportFromShareableHandle, "");
    return InvalidArgument("a descriptor is no memory of this device that its driver has exported (" +
                           status.message() + ")");
  }
  if (result != cu::Result::kSuccess) {
    return WithWayOut(driver().Explain(result, cu::Call::kMemImportFromShareableHandle, ""), result);
  }
  cu::AllocationProp prop;
  Count();
  const cu::Result asked = driver().MemGetAllocationProperties(&prop, *out);
  Status status;
  if (asked != cu::Result::kSuccess) {
    status = driver().Explain(asked, cu::Call::kMemGetAllocationProperties, "");
  } else if (prop.location.type != cu::LocationType::kDevice || prop.location.id != context_.device()) {
    status = InvalidArgument("a descriptor is memory of another device (" + std::to_string(prop.location.id) +
                             ") than the pool's (" + std::to_string(context_.device()) + ")");
  }
  if (status.ok()) return {};
  Count();
  static_cast<void>(driver().MemRelease(*out));
  return status;
}

Status CudaTransit::Reserve() {
  if (base_ != 0) return {};
  const std::int64_t bytes = kPlaces * block_bytes_;
  Count();
  cu::DevicePtr base = 0;
  KVPAGE_CU(driver(), MemAddressReserve, "of " + std::to_string(bytes) + " bytes", &base,
            static_cast<std::size_t>(bytes), 0, 0, 0);
  base_ = base;
  return {};
}

Status CudaTransit::Map(int place, cu::MemHandle handle, bool read_only) {
  Count();
  const cu::Result result = driver().MemMap(Address(place), static_cast<std::size_t>(block_bytes_), 0, handle, 0);
  if (result == cu::Result::kInvalidValue && place == kFrom && places_[place].owned != 0) {
    return WrongSize(block_bytes_);
  }
  if (result != cu::Result::kSuccess) return driver().Explain(result, cu::Call::kMemMap, OfABlock(block_bytes_));
  places_[place].mapped = true;
  return access_->Grant(Address(place), block_bytes_, read_only, OfABlock(block_bytes_));
}

Status CudaTransit::Create(cu::MemHandle* out) {
  cu::AllocationProp prop;
  prop.location.id = context_.device();
  prop.handle_type = cu::HandleType::kPosixFileDescriptor;
  Count();
  KVPAGE_CU(driver(), MemCreate, OfABlock(block_bytes_), out, static_cast<std::size_t>(block_bytes_), &prop, 0);
  return {};
}

Status CudaTransit::Clear() {
  for (int i = 0; i < kPlaces; ++i) {
    Place& place = places_[i];
    if (place.mapped) {
      Count();
      KVPAGE_CU(driver(), MemUnmap, OfABlock(block_bytes_), Address(i), static_cast<std::size_t>(block_bytes_));
      place.mapped = false;
    }
    if (place.owned == 0) continue;
    Count();
    KVPAGE_CU(driver(), MemRelease, OfABlock(block_bytes_), place.owned);
    place.owned = 0;
  }
  return {};
}

void CudaTransit::Free() {
  if (base_ == 0 || !Clear().ok()) return;
  Count();
  static_cast<void>(driver().MemAddressFree(base_, static_cast<std::size_t>(kPlaces * block_bytes_)));
  base_ = 0;
}

Status CudaTransit::Run(cu::Stream stream, const std::function<Status()>& work) {
  KVPAGE_RETURN_IF_ERROR(Reserve());
  KVPAGE_RETURN_IF_ERROR(Clear());
  Status status = work();
  // Also after an error: work queued earlier still uses the places.
  Count();
  const cu::Result done = driver().StreamSynchronize(stream);
  if (status.ok() && done != cu::Result::kSuccess) {
    status = driver().Explain(done, cu::Call::kStreamSynchronize, "after copying a block");
  }
  const Status cleared = Clear();
  return status.ok() ? cleared : status;
}

Status CudaTransit::ExportCopy(cu::MemHandle block, const char* image, std::int64_t payload, cu::Stream stream,
                               Fd* out) {
  Fd fd;
  KVPAGE_RETURN_IF_ERROR(Run(stream, [&]() -> Status {
    Place& copy = places_[kTo];
    KVPAGE_RETURN_IF_ERROR(Create(&copy.owned));
    KVPAGE_RETURN_IF_ERROR(Map(kTo, copy.owned, /*read_only=*/false));
    const std::string what = OfABlock(block_bytes_);
    const auto bytes = static_cast<std::size_t>(payload);
    if (image != nullptr) {
      Count();
      KVPAGE_CU(driver(), MemcpyHtoDAsync, what, Address(kTo), image, bytes, stream);
    } else {
      KVPAGE_RETURN_IF_ERROR(Map(kFrom, block, /*read_only=*/true));
      Count();
      KVPAGE_CU(driver(), MemcpyDtoDAsync, what, Address(kTo), Address(kFrom), bytes, stream);
    }
    if (payload < block_bytes_) {
      // New memory may contain old data.
      Count();
      KVPAGE_CU(driver(), MemsetD8Async, what, Address(kTo) + static_cast<cu::DevicePtr>(payload), 0,
                static_cast<std::size_t>(block_bytes_ - payload), stream);
    }
    return Export(copy.owned, &fd);
  }));
  *out = std::move(fd);
  return {};
}

Status CudaTransit::CopyIn(int fd, cu::MemHandle block, cu::Stream stream) {
  return Run(stream, [&]() -> Status {
    cu::MemHandle received = 0;
    KVPAGE_RETURN_IF_ERROR(Import(fd, &received));
    places_[kFrom].owned = received;
    KVPAGE_RETURN_IF_ERROR(Map(kFrom, received, /*read_only=*/true));
    KVPAGE_RETURN_IF_ERROR(Map(kTo, block, /*read_only=*/false));
    Count();
    KVPAGE_CU(driver(), MemcpyDtoDAsync, OfABlock(block_bytes_), Address(kTo), Address(kFrom),
              static_cast<std::size_t>(block_bytes_), stream);
    return {};
  });
}

}  // namespace kvpage
