// The host call relocate: idle blocks change places so that logical neighbours become neighbours in the memory file,
// where their mappings merge.
//
// It moves blocks that no program can write: those of parked slots, cached prefixes, and those that occupied slots only
// read. A moved block keeps its logical addresses, contents, references and entry in the prefix index. Programs that
// only read and write never wait. The mapping mutex is held for about a megabyte of copies at a time, and between two
// such pieces the pool has as many free blocks as before: a move claims one free block and frees another.
//
// A huge page holds consecutive logical blocks of one range, aligned to its size both in the range and in the file.
// Slots then map it with a single page table entry, so the program that first reads an alias takes one page fault for
// all of it. While the kernel builds a huge page, readers of its blocks wait in a page fault for the copy of 2 MiB.
#ifndef KVPAGE_CACHE_RELOCATION_H_
#define KVPAGE_CACHE_RELOCATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::relocation {

struct Options {
  std::int64_t most_bytes = 0;  // limit on the bytes copied
  bool everything = true;       // otherwise only what `slots` map
  std::vector<std::int32_t> slots;
  bool huge_pages = false;  // put cached and shared blocks that fill a huge page into one
};

struct Report {
  std::int64_t blocks_moved = 0;  // counts a block twice if it made room for others and then moved again
  std::int64_t bytes_copied = 0;
  std::int64_t mappings_before = 0, mappings_after = 0;  // memory mappings of all slots
  std::int64_t huge_pages = 0;                           // that hold cached and shared blocks now
  std::string huge_refused;                              // why there are no more; empty if all possible ones were made
};

// If it fails, all blocks remain mapped with their contents; blocks that have already moved stay at their new places.
Status Relocate(const PoolParts& pool, const Options& options, Report* report);

}  // namespace kvpage::relocation

#endif  // KVPAGE_CACHE_RELOCATION_H_
