// Swapper: writes blocks of swapped sequences to disk and reads them back (swap_file.h). Its threads are separate from
// those of the writer and the reader: swapping out frees memory that somebody is waiting for, and should not queue
// behind prefixes that are merely saved. They start on first use.
#ifndef KVPAGE_STORE_SWAPPER_H_
#define KVPAGE_STORE_SWAPPER_H_

#include <memory>
#include <mutex>

#include "store/block_store.h"
#include "store/catalog.h"
#include "store/swap_file.h"
#include "store/work_queue.h"

namespace kvpage::store {

class Swapper {
 public:
  Swapper(Catalog* catalog, const StoreOptions& options);
  ~Swapper();

  // See BlockStore.
  void Write(SwapWrite write);
  void Read(SwapRead read);
  // Finishes the work in progress; the rest completes with an error.
  void Stop();

 private:
  struct Order;
  struct Piece;
  // Where files account for their space while they exist, which may be longer than the store.
  struct Account;

  void WorkOn(SwapWrite& write);
  void WorkOn(Piece& piece);
  // `good`: number of leading blocks that are in place.
  Problem ReadPiece(const SwapFile& file, const SwapRead& read, std::int64_t begin, std::int64_t count,
                    std::int64_t* good);
  Status WriteFile(const SwapWrite& write, std::shared_ptr<SwapFile>* out);
  void Finish(const Piece& piece, Problem problem, std::int64_t good);

  Catalog* const catalog_;
  const StoreOptions& options_;
  const std::shared_ptr<Account> account_;
  std::mutex mutex_;
  bool stopped_ = false;
  std::unique_ptr<WorkQueue<SwapWrite>> writes_;
  std::unique_ptr<WorkQueue<Piece>> reads_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_SWAPPER_H_
