#include "vmm/cuda_window.h"

#include <algorithm>
#include <string>

namespace kvpage {
namespace {

std::string InTheWindow(std::int64_t bytes) { return "of " + std::to_string(bytes) + " bytes in the block window"; }

}  // namespace

Status CudaWindow::Reserve(std::int64_t blocks) {
  const std::int64_t bytes = blocks * block_bytes_;
  Count();
  cu::DevicePtr base = 0;
  KVPAGE_CU(context_.driver(), MemAddressReserve, InTheWindow(bytes), &base, static_cast<std::size_t>(bytes), 0, 0, 0);
  base_ = base;
  states_.assign(blocks, State::kHole);
  return {};
}

void CudaWindow::Free() {
  if (!reserved()) return;
  bool empty = true;
  for (std::int64_t block = 0; block < capacity(); ++block) empty &= Unmap(static_cast<std::int32_t>(block)).ok();
  if (!empty) return;
  Count();
  static_cast<void>(context_.driver().MemAddressFree(base_, static_cast<std::size_t>(capacity() * block_bytes_)));
  base_ = 0;
  states_.clear();
}

Status CudaWindow::MapOne(std::int32_t block, cu::MemHandle handle) {
  if (states_[block] == State::kMapped) return {};
  Count();
  KVPAGE_CU(context_.driver(), MemMap, InTheWindow(block_bytes_), Address(block),
            static_cast<std::size_t>(block_bytes_), 0, handle, 0);
  states_[block] = State::kMapped;
  return {};
}

Status CudaWindow::Unmap(std::int32_t block) {
  if (block >= capacity() || states_[block] == State::kHole) return {};
  Count();
  KVPAGE_CU(context_.driver(), MemUnmap, InTheWindow(block_bytes_), Address(block),
            static_cast<std::size_t>(block_bytes_));
  states_[block] = State::kHole;
  return {};
}

Status CudaWindow::Allow(const std::vector<std::int32_t>& blocks, const std::vector<bool>& read_only) {
  for (std::size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
    const bool reads = read_only[blocks[begin]];
    for (end = begin + 1; end < blocks.size() && blocks[end] == blocks[end - 1] + 1; ++end) {
      if (read_only[blocks[end]] != reads) break;
    }
    const std::int64_t bytes = static_cast<std::int64_t>(end - begin) * block_bytes_;
    KVPAGE_RETURN_IF_ERROR(access_->Grant(Address(blocks[begin]), bytes, reads, InTheWindow(bytes)));
    for (std::size_t i = begin; i < end; ++i) states_[blocks[i]] = State::kAccessible;
  }
  return {};
}

Status CudaWindow::Protect(std::int32_t block, bool read_only) {
  if (block >= capacity() || states_[block] != State::kAccessible) return {};
  return access_->Grant(Address(block), block_bytes_, read_only, InTheWindow(block_bytes_));
}

Status CudaWindow::Map(const std::int32_t* blocks, std::int64_t count, const std::vector<cu::MemHandle>& handles,
                       const std::vector<bool>& read_only) {
  std::vector<std::int32_t> added(blocks, blocks + count);
  const auto there = [&](std::int32_t block) { return states_[block] == State::kAccessible; };
  added.erase(std::remove_if(added.begin(), added.end(), there), added.end());
  std::sort(added.begin(), added.end());
  Status status;
  std::size_t done = 0;
  while (done < added.size() && (status = MapOne(added[done], handles[added[done]])).ok()) ++done;
  if (status.ok()) status = Allow(added, read_only);
  if (status.ok()) return {};
  while (done-- > 0) static_cast<void>(Unmap(added[done]));
  return status.WithMessage("mapping " + std::to_string(added.size()) + " blocks: " + status.message());
}

}  // namespace kvpage
