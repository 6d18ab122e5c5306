// The part of CudaVmm for blocks that are handed over between processes.
//
// Every block is one allocation, created shareable, so it is handed over as a descriptor. A descriptor cannot be
// revoked and device memory cannot be sealed, so the memory of an exported block is never used for anything else. When
// the pool is done with such a block it releases the handle, and the block number gets new memory.
#include <cstdio>
#include <utility>

#include "vmm/cuda_vmm.h"
#include "vmm/memory_file.h"

namespace kvpage {

Status CudaVmm::NotShareable() const {
  return FailedPrecondition(
      "memory of CUDA device " + std::to_string(context_->ordinal()) +
      " cannot be shared with other processes: its driver gives no file descriptors for it (some containers forbid "
      "that): read_kv gives keys and values as arrays for other transports");
}

Status CudaVmm::Lend(const std::shared_ptr<MemoryFile>& file, const std::int32_t* blocks, const std::int64_t* offsets,
                     std::int64_t count) {
  if (file->sealed()) return Internal("a device cannot map the blocks of a file");
  if (!shareable()) return NotShareable();
  KVPAGE_RETURN_IF_ERROR(Create(blocks, count));
  if (!shareable()) {  // creating the pool's first block showed it
    static_cast<void>(Destroy(blocks, count));
    return NotShareable();
  }
  for (std::int64_t i = 0; i < count; ++i) lent_.Add(blocks[i], file, offsets[i]);
  return {};
}

void CudaVmm::Return(std::int32_t block) {
  if (!exists_[block] || !given(block)) return;
  const ContextScope scope(*context_);
  // If this fails, Create releases the handle before the number is reused.
  if (scope.status().ok()) static_cast<void>(ReleaseOne(block));
}

Status CudaVmm::Protect(const std::vector<std::int32_t>& blocks) {
  const std::unordered_set<std::int32_t> wanted(blocks.begin(), blocks.end());
  for (std::size_t place = 0; place < mapped_.size(); ++place) {
    if (mapped_[place] < 0 || wanted.count(mapped_[place]) == 0) continue;
    KVPAGE_RETURN_IF_ERROR(SetAccess(static_cast<std::int64_t>(place), 1));
  }
  for (const std::int32_t block : blocks) KVPAGE_RETURN_IF_ERROR(window_.Protect(block, read_only_[block]));
  return {};
}

Status CudaVmm::Seal(const std::shared_ptr<MemoryFile>& file) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const std::vector<std::int32_t> blocks = lent_.BlocksOf(*file);
  for (const std::int32_t block : blocks) read_only_[block] = true;
  Status status = Protect(blocks);
  if (status.ok()) status = file->Seal();
  if (status.ok()) return {};
  for (const std::int32_t block : blocks) read_only_[block] = false;
  if (Status back = Protect(blocks); !back.ok()) {
    return Internal(status.message() + "; letting programs write the blocks again failed too: " + back.message());
  }
  return status;
}

Status CudaVmm::MemoryName(std::string* out) {
  cu::Uuid uuid;
  Count();
  KVPAGE_CU(driver(), DeviceGetUuid, "of device " + std::to_string(context_->ordinal()), &uuid, context_->device());
  // Same format as nvidia-smi.
  *out = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char digits[4];
    std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i])));
    if (i == 4 || i == 6 || i == 8 || i == 10) *out += '-';
    *out += digits;
  }
  return {};
}

Status CudaVmm::Export(const std::int32_t* blocks, std::int64_t count, std::vector<Fd>* out) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  if (!shareable()) return NotShareable();
  std::vector<Fd> descriptors(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    KVPAGE_RETURN_IF_ERROR(transit_.Export(handles_[blocks[i]], &descriptors[i]));
  }
  *out = std::move(descriptors);
  return {};
}

Status CudaVmm::ExportCopies(const std::vector<CopySource>& blocks, std::int64_t payload, std::vector<Fd>* out) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  if (!shareable()) return NotShareable();
  std::vector<Fd> descriptors(blocks.size());
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const cu::MemHandle handle = handles_[blocks[i].block];
    KVPAGE_RETURN_IF_ERROR(transit_.ExportCopy(handle, blocks[i].image, payload, stream_, &descriptors[i]));
  }
  *out = std::move(descriptors);
  return {};
}

Status CudaVmm::Import(const std::vector<int>& descriptors, const std::int32_t* blocks) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  const auto count = static_cast<std::int64_t>(descriptors.size());
  const auto import = [&](std::int64_t i) -> Status {
    const std::int32_t block = blocks[i];
    if (exists_[block]) KVPAGE_RETURN_IF_ERROR(ReleaseOne(block));  // left over, as in Create
    KVPAGE_RETURN_IF_ERROR(transit_.Import(descriptors[i], &handles_[block]));
    exists_[block] = read_only_[block] = true;
    received_.insert(block);
    ++num_handles_;
    return {};
  };
  Status status;
  std::int64_t done = 0;
  while (done < count && (status = import(done)).ok()) ++done;
  if (status.ok() && window_.reserved()) status = window_.Map(blocks, count, handles_, read_only_);
  // Blocks that cannot be released now are released before their number gets new memory.
  while (!status.ok() && done-- > 0) static_cast<void>(ReleaseOne(blocks[done]));
  return status;
}

Status CudaVmm::ImportCopies(const std::vector<int>& descriptors, const std::int32_t* blocks) {
  const ContextScope scope(*context_);
  KVPAGE_RETURN_IF_ERROR(scope.status());
  for (std::size_t i = 0; i < descriptors.size(); ++i) {
    KVPAGE_RETURN_IF_ERROR(transit_.CopyIn(descriptors[i], handles_[blocks[i]], stream_));
  }
  return {};
}

}  // namespace kvpage
