#include "store/writer.h"

#include <algorithm>
#include <exception>
#include <set>
#include <string>
#include <vector>

#include "store/block_file.h"

namespace kvpage::store {
namespace {

std::int64_t Blocks(const WriteRun& run) { return static_cast<std::int64_t>(run.sources.size()) / run.shape.ranges; }
std::int64_t Bytes(const WriteRun& run) { return Blocks(run) * run.shape.bytes(); }

}  // namespace

Writer::Writer(Catalog* catalog, const StoreOptions& options)
    : catalog_(catalog),
      options_(options),
      queue_(options.writers, options.most_queued_bytes, [this](WriteRun& run) { Work(run); }) {}

bool Writer::Write(WriteRun& run) {
  const std::int64_t bytes = Bytes(run);
  if (queue_.Offer(run, bytes)) return true;
  catalog_->Count([&](StoreNumbers* numbers) {
    ++numbers->runs_dropped;
    numbers->bytes_dropped += bytes;
  });
  return false;
}

void Writer::Work(WriteRun& run) {
  Status status;
  try {
    if (run.fill && !run.fill(&run)) return;
    status = WriteFiles(run);
  } catch (const std::exception& error) {  // such as std::bad_alloc
    status = Internal(std::string("writing blocks to a store: ") + error.what());
  }
  if (!status.ok()) {
    catalog_->NoteError(status);
    catalog_->Count([](StoreNumbers* numbers) { ++numbers->failed_writes; });
  }
  if (run.done) run.done(status);
}

Status Writer::WriteFiles(const WriteRun& run) {
  const BlockShape& shape = run.shape;
  FileHeader header;
  header.identity = catalog_->MakeIdentity(shape, run.space);
  const std::int64_t end = run.first_block + Blocks(run);
  const std::vector<StoredPart> stored =
      catalog_->Find(header.identity, run.tokens.data(), static_cast<std::int64_t>(run.tokens.size()));
  const std::int64_t most = std::max<std::int64_t>(options_.file_bytes / shape.bytes(), 1);
  std::int64_t begin = std::max(run.first_block, stored.empty() ? 0 : stored.back().end);
  while (begin < end) {
    const std::int64_t stop = std::min(begin + most, end);
    header.first_block = begin;
    header.tokens.assign(run.tokens.begin(), run.tokens.begin() + stop * shape.block_tokens);
    header.checksums.assign(stop - begin, 0);
    const std::int64_t bytes = static_cast<std::int64_t>(EncodeHeader(header).size()) + header.data_bytes();
    if (bytes > options_.limit_bytes) {
      return ResourceExhausted("a file of " + std::to_string(bytes) + " bytes does not fit in a store of " +
                               std::to_string(options_.limit_bytes));
    }
    // The files that this file continues must be kept, because it could not be found without them.
    std::set<std::string> kept;
    for (const StoredPart& part :
         catalog_->Find(header.identity, run.tokens.data(), static_cast<std::int64_t>(run.tokens.size()))) {
      kept.insert(part.file);
    }
    if (!catalog_->Evict(options_.limit_bytes - bytes, kept)) {
      return ResourceExhausted("a sequence does not fit in a store of " + std::to_string(options_.limit_bytes) +
                               " bytes: " + std::to_string(bytes) + " more are wanted for block " +
                               std::to_string(begin) + " on, beside the files that it continues");
    }
    std::string name;
    std::int64_t written = 0;
    const char* const* const sources = run.sources.data() + (begin - run.first_block) * shape.ranges;
    KVPAGE_RETURN_IF_ERROR(WriteBlockFile(options_.io.get(), catalog_->folder(), &header, sources, &name, &written));
    catalog_->Add(name, written, header);
    catalog_->Count([&](StoreNumbers* numbers) {
      numbers->blocks_written += stop - begin;
      numbers->bytes_written += header.data_bytes();
    });
    begin = stop;
  }
  return {};
}

void Writer::Stop() {
  for (const WriteRun& run : queue_.Stop()) {
    if (run.done) run.done(FailedPrecondition("the store was closed before the blocks were written", Reason::kClosed));
  }
}

}  // namespace kvpage::store
