// SwapFile: blocks that this process has written for itself. The file has no name, so the system removes it when the
// process ends for any reason, and no lookup finds it. Its checksums are in memory.
#ifndef KVPAGE_STORE_SWAP_FILE_H_
#define KVPAGE_STORE_SWAP_FILE_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/status.h"
#include "store/file_header.h"
#include "store/file_io.h"
#include "store/folder.h"
#include "store/swap_store.h"

namespace kvpage::store {

class SwapFile final : public SwapImage {
 public:
  ~SwapFile() override;
  SwapFile(const SwapFile&) = delete;
  SwapFile& operator=(const SwapFile&) = delete;

  // Writes blocks, and returns when they are on disk. If a copy is refused, returns an OK status and no file.
  static Status Write(FileIo* io, const Folder& folder, const BlockShape& shape, std::int64_t blocks,
                      const SwapWrite::CopyBlocks& copy, std::shared_ptr<SwapFile>* out);

  const BlockShape& shape() const { return shape_; }
  std::int64_t blocks() const override { return static_cast<std::int64_t>(checksums_.size()); }
  std::int64_t bytes() const override { return blocks() * shape_.bytes(); }
  bool outlives_failures() const override { return false; }
  // Reads `count` blocks, starting at `begin`, to `destinations`, [count, ranges]. `good`: number of leading blocks
  // that are correct.
  Problem Read(FileIo* io, std::int64_t begin, std::int64_t count, char* const* destinations, std::int64_t* good) const;
  // Called when the file is destroyed. Set it before another thread has the file.
  void set_on_end(std::function<void()> on_end) { on_end_ = std::move(on_end); }

 private:
  SwapFile(BlockShape shape, Fd fd);

  const pid_t process_;
  const BlockShape shape_;
  const Fd fd_;
  std::vector<std::uint32_t> checksums_;
  std::function<void()> on_end_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_SWAP_FILE_H_
