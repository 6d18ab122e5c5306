#include "store/reader.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "store/block_file.h"

namespace kvpage::store {

struct Reader::Order {
  bool cancelled() const { return request.cancelled != nullptr && request.cancelled->load(); }

  Identity identity;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
  ReadRequest request;
  std::shared_ptr<ReadTicket> ticket;
};

// A file shared by the pieces of an order. The first piece opens it.
struct Reader::File {
  StoredPart part;
  std::once_flag once;
  Problem problem = Problem::kNone;
  BlockFile file;

  void Open(FileIo* io, const Folder& folder, const Order& order) {
    problem = file.Open(io, folder, part.file);
    if (problem != Problem::kNone) return;
    // It may have been replaced since it was found.
    const FileHeader& header = file.header();
    const std::vector<std::int32_t>& wanted = order.request.tokens;
    const std::size_t tokens = std::min<std::size_t>(wanted.size(), part.end * header.identity.shape.block_tokens);
    const bool same = header.identity == order.identity && header.first_block == part.begin - part.index &&
                      header.tokens.size() >= tokens &&
                      std::equal(wanted.begin(), wanted.begin() + tokens, header.tokens.begin());
    if (!same) problem = Problem::kGone;
  }
};

Reader::Reader(Catalog* catalog, const StoreOptions& options)
    : catalog_(catalog),
      options_(options),
      queue_(options.readers, std::numeric_limits<std::int64_t>::max(), [this](Piece& piece) { Work(piece); }) {}

void Reader::Work(Piece& piece) {
  const Order& order = *piece.order;
  if (order.cancelled()) return Finish(order, Problem::kClosed, piece.at);
  File& file = *piece.file;
  FileIo* const io = options_.io.get();
  std::call_once(file.once, [&] {
    file.Open(io, catalog_->folder(), order);
    if (file.problem == Problem::kNone) file.file.Touch();
  });
  std::int64_t good = 0;
  Problem problem = file.problem;
  if (problem == Problem::kNone) {
    char* const* const to = order.request.destinations.data() + piece.at * order.request.shape.ranges;
    problem = file.file.Read(io, piece.index, piece.blocks, to, &good);
  }
  catalog_->Count([&](StoreNumbers* numbers) {
    numbers->blocks_read += good;
    numbers->bytes_read += good * order.request.shape.bytes();
  });
  if (problem != Problem::kNone) catalog_->NoteProblem(file.part.file, problem);
  Finish(order, problem, piece.at + good);
}

void Reader::Finish(const Order& order, Problem problem, std::int64_t good) {
  if (!order.ticket->Finish(problem, good)) return;
  const std::int64_t blocks = order.ticket->blocks();
  if (blocks > 0) {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - order.begun;
    catalog_->NoteRead(blocks * order.request.shape.bytes(), passed.count());
  }
  if (order.request.done) order.request.done(blocks, order.ticket->problem());
}

std::shared_ptr<ReadTicket> Reader::Read(ReadRequest request) {
  const auto order = std::make_shared<Order>();
  order->identity = catalog_->MakeIdentity(request.shape, request.space);
  order->request = std::move(request);
  const ReadRequest& wanted = order->request;
  const BlockShape& shape = wanted.shape;
  const auto end = static_cast<std::int64_t>(wanted.tokens.size()) / shape.block_tokens;
  const std::vector<StoredPart> parts = catalog_->Find(order->identity, wanted.tokens.data(), end * shape.block_tokens);
  const std::int64_t most = std::max<std::int64_t>(kPieceBytes / shape.bytes(), 1);
  std::vector<Piece> pieces;
  std::int64_t stored = wanted.begin;
  for (const StoredPart& part : parts) {
    const std::int64_t from = std::max(part.begin, wanted.begin), to = std::min(part.end, end);
    if (from >= to) continue;
    const auto file = std::make_shared<File>();
    file->part = part;
    // Pieces of equal size, so that none is short.
    const std::int64_t count = std::max<std::int64_t>((to - from) / most, 1);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = from + (to - from) * i / count, next = from + (to - from) * (i + 1) / count;
      pieces.push_back({order, file, part.index + at - part.begin, at - wanted.begin, next - at});
    }
    stored = to;
  }
  const auto number = static_cast<std::int64_t>(pieces.size());
  const Problem problem = stored < end ? Problem::kGone : Problem::kNone;
  const auto ticket = std::make_shared<ReadTicket>(stored - wanted.begin, number, problem);
  order->ticket = ticket;
  for (Piece& piece : pieces) {
    const std::int64_t at = piece.at;
    if (!queue_.Offer(piece, piece.blocks * shape.bytes())) Finish(*order, Problem::kClosed, at);
  }
  if (number == 0 && wanted.done) wanted.done(ticket->blocks(), problem);
  return ticket;
}

void Reader::Stop() {
  for (const Piece& piece : queue_.Stop()) {
    catalog_->NoteProblem(piece.file->part.file, Problem::kClosed);
    Finish(*piece.order, Problem::kClosed, piece.at);
  }
}

}  // namespace kvpage::store
