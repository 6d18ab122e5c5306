// Identifies the process: a pool works only in the process that created it, not in forked children.
#ifndef KVPAGE_CACHE_PROCESS_H_
#define KVPAGE_CACHE_PROCESS_H_

#include <mutex>

namespace kvpage {

// Number of forks in this process's ancestry since the library was loaded.
int ForkCount();

// The mutex of the registry, which is never destroyed. A fork waits for it, and it is free in both processes
// afterwards, so it is never left locked in a child. Its holder must not wait for anything else.
std::mutex& RegistryMutex();

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PROCESS_H_
