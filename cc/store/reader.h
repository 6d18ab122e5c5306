// Reader: stored blocks on their way into memory. A request is cut into pieces, of 2 MiB or more where it is that long,
// that several threads read at a time; each block is checked as soon as it is there.
#ifndef KVPAGE_STORE_READER_H_
#define KVPAGE_STORE_READER_H_

#include <cstdint>
#include <memory>

#include "store/block_store.h"
#include "store/catalog.h"
#include "store/work_queue.h"

namespace kvpage::store {

class Reader {
 public:
  Reader(Catalog* catalog, const StoreOptions& options);
  ~Reader() { Stop(); }

  std::shared_ptr<ReadTicket> Read(ReadRequest request);
  // Ends the pieces that have begun. The others are not read.
  void Stop();

 private:
  struct File;
  struct Order;
  // Blocks of one file, the first of them the `index`-th of the file and the `at`-th of the order.
  struct Piece {
    std::shared_ptr<Order> order;
    std::shared_ptr<File> file;
    std::int64_t index = 0, at = 0, blocks = 0;
  };
  void Work(Piece& piece);
  // A piece of an order is done; the last one ends the order.
  void Finish(const Order& order, Problem problem, std::int64_t good);

  Catalog* const catalog_;
  const StoreOptions& options_;
  WorkQueue<Piece> queue_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_READER_H_
