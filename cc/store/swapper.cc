#include "store/swapper.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "store/block_file.h"

namespace kvpage::store {
namespace {

constexpr std::int64_t kAnyNumber = std::numeric_limits<std::int64_t>::max();

Status Closed() { return FailedPrecondition("the store was closed before the blocks were written", Reason::kClosed); }

// The store creates all of its images itself.
const SwapFile& FileOf(const SwapRead& read) { return static_cast<const SwapFile&>(*read.image); }

}  // namespace

struct Swapper::Account {
  std::mutex mutex;
  Catalog* catalog = nullptr;  // null if it was destroyed

  void Return(std::int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (catalog != nullptr) static_cast<void>(catalog->ReserveSwapped(-bytes));
  }
};

// A read whose pieces several threads process.
struct Swapper::Order {
  SwapRead read;
  std::mutex mutex;
  std::int64_t pieces = 0;  // not done yet
  std::int64_t good = 0;
  Problem problem = Problem::kNone;
};

// Blocks [begin, end) of a file.
struct Swapper::Piece {
  std::shared_ptr<Order> order;
  std::int64_t begin = 0, end = 0;
};

Swapper::Swapper(Catalog* catalog, const StoreOptions& options)
    : catalog_(catalog), options_(options), account_(std::make_shared<Account>()) {
  account_->catalog = catalog;
}

Swapper::~Swapper() {
  Stop();
  const std::lock_guard<std::mutex> lock(account_->mutex);
  account_->catalog = nullptr;
}

void Swapper::Write(SwapWrite write) {
  Status status;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_) {
      status = Closed();
    } else {
      try {
        if (writes_ == nullptr) {
          writes_ = std::make_unique<WorkQueue<SwapWrite>>(options_.writers, kAnyNumber,
                                                           [this](SwapWrite& each) { WorkOn(each); });
        }
        if (writes_->Offer(write, write.blocks * write.shape.bytes())) return;
        status = Closed();
      } catch (const std::exception& error) {
        status = ResourceExhausted(std::string("the threads of a store could not be started: ") + error.what());
      }
    }
  }
  write.done(status, nullptr);
}

void Swapper::WorkOn(SwapWrite& write) {
  Status status;
  std::shared_ptr<SwapFile> file;
  try {
    status = WriteFile(write, &file);
  } catch (const std::exception& error) {  // such as std::bad_alloc
    status = Internal(std::string("writing swapped blocks: ") + error.what());
  }
  if (status.ok() && file == nullptr && write.failure != nullptr) status = *write.failure;
  if (!status.ok()) {
    catalog_->NoteError(status);
    catalog_->Count([](StoreNumbers* numbers) { ++numbers->failed_writes; });
  }
  write.done(status, std::move(file));
}

Status Swapper::WriteFile(const SwapWrite& write, std::shared_ptr<SwapFile>* out) {
  const std::int64_t bytes = write.blocks * write.shape.bytes();
  if (!catalog_->ReserveSwapped(bytes)) {
    return ResourceExhausted(std::to_string(bytes) + " bytes of a swapped sequence do not fit in a store of " +
                             std::to_string(options_.limit_bytes));
  }
  Status status = SwapFile::Write(options_.io.get(), catalog_->folder(), write.shape, write.blocks, write.copy, out);
  if (*out == nullptr) {
    account_->Return(bytes);
    return status;
  }
  (*out)->set_on_end([account = account_, bytes] { account->Return(bytes); });
  catalog_->Count([&](StoreNumbers* numbers) {
    numbers->blocks_written += write.blocks;
    numbers->bytes_written += bytes;
  });
  catalog_->NoteSwapOut(SecondsOf(write));
  return {};
}

void Swapper::Read(SwapRead read) {
  const auto order = std::make_shared<Order>();
  order->read = std::move(read);
  const SwapFile& file = FileOf(order->read);
  order->good = file.blocks();
  // Pieces of equal size, so that none is short.
  const std::int64_t most = std::max<std::int64_t>(kPieceBytes / file.shape().bytes(), 1);
  const std::int64_t count = std::max<std::int64_t>(file.blocks() / most, 1);
  order->pieces = count;
  for (std::int64_t i = 0; i < count; ++i) {
    Piece piece{order, file.blocks() * i / count, file.blocks() * (i + 1) / count};
    Problem problem = Problem::kClosed;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!stopped_) {
        try {
          if (reads_ == nullptr) {
            reads_ =
                std::make_unique<WorkQueue<Piece>>(options_.readers, kAnyNumber, [this](Piece& each) { WorkOn(each); });
          }
          if (reads_->Offer(piece, (piece.end - piece.begin) * file.shape().bytes())) continue;
        } catch (const std::exception&) {  // cannot start a thread
          problem = Problem::kUnreadable;
        }
      }
    }
    Finish(piece, problem, 0);
  }
}

Problem Swapper::ReadPiece(const SwapFile& file, const SwapRead& read, std::int64_t begin, std::int64_t count,
                           std::int64_t* good) {
  const BlockShape& shape = file.shape();
  if (!read.place) {
    return file.Read(options_.io.get(), begin, count, read.destinations.data() + begin * shape.ranges, good);
  }
  std::vector<char> blocks(static_cast<std::size_t>(count * shape.bytes()));
  std::vector<char*> destinations;
  for (std::int64_t i = 0; i < count * shape.ranges; ++i) destinations.push_back(blocks.data() + i * shape.block_bytes);
  const Problem problem = file.Read(options_.io.get(), begin, count, destinations.data(), good);
  const Status placed = *good == 0 ? Status() : read.place(begin, *good, blocks.data());
  if (placed.ok()) return problem;
  catalog_->NoteError(placed);
  *good = 0;
  return Problem::kUnreadable;
}

void Swapper::WorkOn(Piece& piece) {
  const SwapRead& read = piece.order->read;
  const SwapFile& file = FileOf(read);
  const BlockShape& shape = file.shape();
  std::int64_t good = 0;
  Problem problem = Problem::kNone;
  try {
    problem = ReadPiece(file, read, piece.begin, piece.end - piece.begin, &good);
  } catch (const std::exception&) {  // such as std::bad_alloc
    problem = Problem::kUnreadable;
  }
  catalog_->Count([&](StoreNumbers* numbers) {
    numbers->blocks_read += good;
    numbers->bytes_read += good * shape.bytes();
    if (problem != Problem::kNone) ++numbers->missed[static_cast<int>(problem)];
  });
  Finish(piece, problem, good);
}

void Swapper::Finish(const Piece& piece, Problem problem, std::int64_t good) {
  Order& order = *piece.order;
  {
    const std::lock_guard<std::mutex> lock(order.mutex);
    if (problem != Problem::kNone && piece.begin + good < order.good) {
      order.good = piece.begin + good;
      order.problem = problem;
    }
    if (--order.pieces > 0) return;
  }
  if (order.good > 0) {
    const double seconds = SecondsOf(order.read);
    catalog_->NoteRead(order.good * FileOf(order.read).shape().bytes(), seconds);
    catalog_->NoteSwapIn(seconds);
  }
  order.read.image.reset();  // before anybody checks what is on disk
  order.read.done(order.problem, order.good);
}

void Swapper::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  // From now on nobody creates or uses a queue.
  if (writes_ != nullptr) {
    for (const SwapWrite& write : writes_->Stop()) write.done(Closed(), nullptr);
  }
  if (reads_ != nullptr) {
    for (const Piece& piece : reads_->Stop()) Finish(piece, Problem::kClosed, 0);
  }
}

}  // namespace kvpage::store
