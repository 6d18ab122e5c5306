// Which process this is: a pool works in the process that made it, and in no fork of it.
#ifndef KVPAGE_CACHE_PROCESS_H_
#define KVPAGE_CACHE_PROCESS_H_

#include <mutex>

namespace kvpage {

// How often this process's ancestors have forked since the library was loaded.
int ForkCount();

// The registry's mutex, which outlives the process. A fork waits for it and both processes go on without it, so that it
// is never left locked in a child. Whoever holds it waits for nothing else.
std::mutex& RegistryMutex();

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PROCESS_H_
