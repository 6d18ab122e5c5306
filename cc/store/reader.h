// Reader: reads stored blocks into memory. A request is cut into pieces, of at least 2 MiB if it is that long, which
// several threads read concurrently; each block is checked as soon as it has been read.
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
  // Finishes the pieces in progress. The others are not read.
  void Stop();

 private:
  struct File;
  struct Order;
  // Blocks of one file; the first is the `index`-th of the file and the `at`-th of the order.
  struct Piece {
    std::shared_ptr<Order> order;
    std::shared_ptr<File> file;
    std::int64_t index = 0, at = 0, blocks = 0;
  };
  void Work(Piece& piece);
  // Called when a piece of an order is done; the last piece completes the order.
  void Finish(const Order& order, Problem problem, std::int64_t good);

  Catalog* const catalog_;
  const StoreOptions& options_;
  WorkQueue<Piece> queue_;
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_READER_H_
