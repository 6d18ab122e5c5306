// Directory: what the files of a store hold, in memory. A tree of token blocks for each identity, as the prefix index
// has it, whose nodes name the files that hold a block. Hashes find candidates, tokens decide.
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

// Blocks [begin, end) of a sequence that a file holds, and which of its blocks the first one is.
struct StoredPart {
  std::string file;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t index = 0;
};

// A file's blocks as a sequence: its tokens from the beginning.
struct StoredRun {
  std::string file;
  std::string space;
  std::vector<std::int32_t> tokens;
  std::int64_t first_block = 0;
  std::int64_t end_block = 0;
};

class Directory {
 public:
  // Adds a file; one of the same name is replaced.
  void Add(const std::string& name, std::int64_t bytes, const FileHeader& header);
  // A file that holds nothing for anybody. It counts towards the size all the same.
  void AddRefused(const std::string& name, std::int64_t bytes, Problem problem);
  // A file that is there turns out to be of no use.
  void Refuse(const std::string& name, Problem problem);
  void Remove(const std::string& name);
  bool Has(const std::string& name) const { return files_.count(name) > 0; }
  // What is wrong with a file; kGone: it is not here.
  Problem ProblemOf(const std::string& name) const;
  std::vector<std::string> Names() const;

  // The longest stored prefix of `tokens`, in whole blocks: parts that follow each other from block 0 on.
  std::vector<StoredPart> Find(const Identity& identity, const std::int32_t* tokens, std::int64_t count) const;
  // Whether there are files of this namespace and fingerprint with another shape, and none with this one.
  bool OtherShape(const Identity& identity) const;
  // What a file holds; a run without tokens if it holds nothing. `identity`: whose.
  StoredRun RunOf(const std::string& name, Identity* identity) const;
  // All files with this shape and fingerprint, parents before what continues them.
  std::vector<StoredRun> Runs(const BlockShape& shape, const std::string& fingerprint) const;

  std::int64_t num_files() const { return static_cast<std::int64_t>(files_.size()); }
  std::int64_t bytes() const { return bytes_; }
  // [kNumProblems]: number of rejected files per reason.
  const std::vector<std::int64_t>& refused() const { return refused_; }
  // Number of files of models with other fingerprints. Takes time linear in the number of models, not of files.
  std::int64_t CountForeign(const std::string& fingerprint) const;

  // Which files to remove until at most `limit` bytes are left, least recently used first, but none before those that
  // continue it, and none of `kept` nor what those continue. `used`: when each file was used; one that is not there has
  // just been written.
  std::vector<std::string> PlanEviction(std::int64_t limit, const std::map<std::string, double>& used,
                                        const std::set<std::string>& kept = {}) const;

 private:
  struct Node {
    std::uint64_t hash = 0;
    std::int32_t parent = -1;  // -1: a root
    std::int32_t root = -1;
    std::vector<std::int32_t> tokens;
    std::vector<std::pair<std::int32_t, std::int64_t>> files;  // (file, which of its blocks)
    std::int32_t children = 0;
  };
  struct File {
    std::string name;
    std::int64_t bytes = 0;
    std::int64_t first_block = 0;
    std::int64_t end_block = 0;
    std::int32_t last = -1;  // the node of its last block; -1: refused
    Problem problem = Problem::kNone;
  };

  std::int32_t FindRoot(const Identity& identity) const;
  std::int32_t Child(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens, std::int64_t count) const;
  std::int32_t NewNode(std::int32_t parent, std::uint64_t hash, const std::int32_t* tokens, std::int64_t count);
  // Removes a node that nobody needs, and its parents likewise.
  void Collect(std::int32_t id);
  std::int32_t NewFile(const std::string& name, std::int64_t bytes);

  std::vector<Identity> identities_;                              // of roots
  std::vector<std::int32_t> roots_;                               // their nodes
  std::vector<std::int64_t> root_files_;                          // number of files of each
  std::unordered_multimap<std::uint64_t, std::int32_t> by_hash_;  // nodes that are no roots
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
