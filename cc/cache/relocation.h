// The host verb relocate: idle blocks change places so that logical neighbours lie next to each other in the memory
// file, where their mappings merge.
//
// It moves what no program can write: blocks of parked slots, cached prefixes, and what occupied slots only read. A
// moved block keeps its logical addresses, contents, references and entry of the prefix index. Programs that only read
// and write never wait; the mapping mutex is held for about a megabyte of copies at a time. Between two such pieces
// nothing is taken from the pool: a move claims one free block and frees another.
//
// A huge page holds consecutive logical blocks of one range, from a multiple of its size in the range and in the file.
// Slots then map it by one entry of the page table, so the program that first reads an alias takes one page fault for
// all of it. While the kernel makes one, readers of its blocks wait in a page fault for the copy of 2 MiB.
#ifndef KVPAGE_CACHE_RELOCATION_H_
#define KVPAGE_CACHE_RELOCATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cache/parts.h"

namespace kvpage::relocation {

struct Options {
  std::int64_t most_bytes = 0;  // to be copied
  bool everything = true;       // or what `slots` map only
  std::vector<std::int32_t> slots;
  bool huge_pages = false;  // put cached and shared blocks that fill one into a huge page
};

struct Report {
  std::int64_t blocks_moved = 0;  // a block that made room for others and then moved again counts twice
  std::int64_t bytes_copied = 0;
  std::int64_t mappings_before = 0, mappings_after = 0;  // memory mappings of all slots
  std::int64_t huge_pages = 0;                           // that hold cached and shared blocks now
  std::string huge_refused;                              // why there are no more; empty: all that were possible
};

// A failure leaves the block that it befell, and all others, mapped and with their contents; those that had moved
// before stay at their new places.
Status Relocate(const PoolParts& pool, const Options& options, Report* report);

}  // namespace kvpage::relocation

#endif  // KVPAGE_CACHE_RELOCATION_H_
