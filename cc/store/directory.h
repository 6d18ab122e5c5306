// Directory: in memory, what the files of a store hold. Like the prefix index, it has a tree of token blocks for each
// identity, whose nodes list the files that hold a block. Hashes only find candidates; tokens are always compared.
//
// No locks and no system calls.
#ifndef KVPAGE_STORE_DIRECTORY_H_
#define KVPAGE_STORE_DIRECTORY_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "store/file_header.h"

namespace kvpage::store {

// Blocks [begin, end) of a sequence that a file holds, and the index of the first one in the file.
struct StoredPart {
  std::string file;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t index = 0;
};

// A file's blocks as part of a sequence, whose tokens are given from the start.
struct StoredRun {
  std::string file;
  std::string space;
  std::vector<std::int32_t> tokens;
  std::int64_t first_block = 0;
  std::int64_t end_block = 0;
};

class Directory {
 public:
  // Adds a file; replaces one with the same name.
  void Add(const std::string& name, std::int64_t bytes, const FileHeader& header);
  // Adds a file that nobody can use, but that counts towards the size.
  void AddRefused(const std::string& name, std::int64_t bytes, Problem problem);
  // Marks an existing file as unusable.
  void Refuse(const std::string& name, Problem problem);
  void Remove(const std::string& name);
  bool Has(const std::string& name) const { return files_.count(name) > 0; }
  // The problem with a file; kGone if there is no such file.
  Problem ProblemOf(const std::string& name) const;
  // The size of a file; 0 if there is no such file.
  std::int64_t BytesOf(const std::string& name) const;
  std::vector<std::string> Names() const;

  // The longest stored prefix of `tokens` in full blocks, as consecutive parts starting at block 0.
  std::vector<StoredPart> Find(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const;
  // Whether there are files of this namespace and fingerprint with another shape, and none with this one.
  bool OtherShape(const Identity& identity) const;
  // The contents of a file; a run without tokens if it is unusable. `identity`: whose contents they are.
  StoredRun RunOf(const std::string& name, Identity* identity) const;
  // All files with this shape and fingerprint, parents first.
  std::vector<StoredRun> Runs(const BlockShape& shape, const std::string& fingerprint) const;

  std::int64_t num_files() const { return static_cast<std::int64_t>(files_.size()); }
  std::int64_t bytes() const { return bytes_; }
  // [kNumProblems]: number of rejected files per reason.
  const std::vector<std::int64_t>& refused() const { return refused_; }
  // Number of files of models with other fingerprints. Takes time linear in the number of models, not of files.
  std::int64_t CountForeign(const std::string& fingerprint) const;

  // Chooses files to remove until at most `limit` bytes are left: the least recently used first, but none before the
  // files that continue it, and none of `kept` or that these continue. `used`: when each file was last used; files
  // missing there have just been written.
  std::vector<std::string> PlanEviction(std::int64_t limit, const std::map<std::string, double>& used,
                                        const std::set<std::string>& kept = {}) const;

 private:
  struct Node {
    std::uint64_t hash = 0;
    std::int32_t parent = -1;  // -1: a root
    std::int32_t root = -1;
    std::vector<std::int32_t> tokens;
    std::vector<std::pair<std::int32_t, std::int64_t>> files;  // (file, index of the block in the file)
    std::int32_t children = 0;
  };
  struct File {
    std::string name;
    std::int64_t bytes = 0;
    std::int64_t first_block = 0;
    std::int64_t end_block = 0;
    std::int32_t last = -1;  // node of its last block; -1: refused
    Problem problem = Problem::kNone;
  };

  std::int32_t FindRoot(const Identity& identity) const;
  std::int32_t Child(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens, std::int64_t count) const;
  std::int32_t NewNode(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens, std::int64_t count);
  // Removes a node that is no longer needed, and then its parents likewise.
  void Collect(std::int32_t id);
  std::int32_t NewFile(const std::string& name, std::int64_t bytes);

  std::vector<Identity> identities_;                              // of roots
  std::vector<std::int32_t> roots_;                               // nodes of the roots
  std::vector<std::int64_t> root_files_;                          // number of files of each
  std::unordered_multimap<std::uint64_t, std::int32_t> by_hash_;  // nodes other than roots
  std::vector<Node> nodes_;
  std::vector<std::int32_t> unused_nodes_;
  std::vector<File> slots_;  // by number
  std::vector<std::int32_t> unused_files_;
  std::map<std::string, std::int32_t> files_;
  std::int64_t bytes_ = 0;
  std::vector<std::int64_t> refused_ = std::vector<std::int64_t>(kNumProblems);
};

}  // namespace kvpage::store

#endif  // KVPAGE_STORE_DIRECTORY_H_
