#include "store/inspect.h"

#include <algorithm>
#include <map>

#include "store/block_file.h"
#include "store/directory.h"
#include "store/folder.h"

namespace kvpage::store {
namespace {

// Reads all blocks of a file.
Problem Verify(FileIo* io, const BlockFile& file) {
  const FileHeader& header = file.header();
  const BlockShape& shape = header.identity.shape;
  const std::int64_t piece = std::max<std::int64_t>(kPieceBytes / shape.bytes(), 1);
  std::vector<char> buffer(std::min(piece, header.blocks()) * shape.bytes());
  std::vector<char*> ranges;
  for (std::size_t at = 0; at < buffer.size(); at += shape.block_bytes) ranges.push_back(buffer.data() + at);
  for (std::int64_t block = 0; block < header.blocks(); block += piece) {
    std::int64_t good = 0;
    const Problem problem = file.Read(io, block, std::min(piece, header.blocks() - block), ranges.data(), &good);
    if (problem != Problem::kNone) return problem;
  }
  return Problem::kNone;
}

Status Examine(const Folder& folder, bool verify, std::vector<FileReport>* out) {
  FileIo io;
  std::vector<FolderEntry> entries;
  KVPAGE_RETURN_IF_ERROR(folder.List(&entries));
  std::sort(entries.begin(), entries.end(), [](const FolderEntry& a, const FolderEntry& b) { return a.name < b.name; });
  out->clear();
  for (const FolderEntry& entry : entries) {
    BlockFile file;
    FileReport report{entry.name, entry.bytes, entry.used, file.Open(&io, folder, entry.name), {}};
    if (report.problem == Problem::kGone) continue;
    if (report.problem == Problem::kNone && verify) report.problem = Verify(&io, file);
    if (report.problem == Problem::kNone) report.header = file.header();
    out->push_back(std::move(report));
  }
  return {};
}

}  // namespace

Status ListFiles(const std::string& path, bool verify, std::vector<FileReport>* out) {
  Folder folder;
  KVPAGE_RETURN_IF_ERROR(Folder::Find(path, &folder));
  return Examine(folder, verify, out);
}

Status Prune(const std::string& path, std::int64_t limit, double used_before, std::vector<std::string>* removed) {
  Folder folder;
  KVPAGE_RETURN_IF_ERROR(Folder::Find(path, &folder));
  const FolderLock lock = folder.TryLock();
  if (!lock.ok()) return FailedPrecondition("another process removes files from " + path + ": try again");
  folder.RemoveOrphans();
  std::vector<FileReport> reports;
  KVPAGE_RETURN_IF_ERROR(Examine(folder, /*verify=*/false, &reports));
  Directory directory;
  std::map<std::string, double> used;
  std::vector<std::string> plan;
  for (const FileReport& report : reports) {
    if (report.used < used_before) {
      plan.push_back(report.name);
      continue;
    }
    used[report.name] = report.used;
    if (report.problem == Problem::kNone) {
      directory.Add(report.name, report.bytes, report.header);
    } else {
      directory.AddRefused(report.name, report.bytes, report.problem);
    }
  }
  for (const std::string& name : directory.PlanEviction(limit, used)) plan.push_back(name);
  removed->clear();
  for (const std::string& name : plan) {
    if (folder.Remove(name)) removed->push_back(name);
  }
  return {};
}

}  // namespace kvpage::store
