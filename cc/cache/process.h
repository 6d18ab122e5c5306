// Which process this is: a pool works in the process that made it, and in no fork of it.
#ifndef KVPAGE_CACHE_PROCESS_H_
#define KVPAGE_CACHE_PROCESS_H_

namespace kvpage {

// How often this process's ancestors have forked since the library was loaded.
int ForkCount();

}  // namespace kvpage

#endif  // KVPAGE_CACHE_PROCESS_H_
