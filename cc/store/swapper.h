// Swapper: blocks of swapped sequences on their way to disk and back (swap_file.h). It has threads apart from those of
// the writer and the reader: what is swapped out frees memory that somebody waits for, and does not stand in line
// behind prefixes that are only saved. They start with the first use.
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
  // Ends the work that has begun; the rest is done with an error.
  void Stop();

 private:
  struct Order;
  struct Piece;
  // What files count on while they live, which may be longer than the store does.
  struct Account;

  void WorkOn(SwapWrite& write);
  void WorkOn(Piece& piece);
  // `good`: of the blocks, the first ones that are where they belong.
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
