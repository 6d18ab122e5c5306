// Registry: pool ids, as programs carry them, to pools.
//
// Ids are positive and never reused, so a program queued after a close fails instead of writing to another pool. They
// begin at a random number in every process, so a cache that was pickled in another process does not name a pool of
// this one. The registry is never destroyed: programs may still be running when the process exits.
#ifndef KVPAGE_CACHE_REGISTRY_H_
#define KVPAGE_CACHE_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "cache/pool.h"

namespace kvpage {

// Assigns an id to the pool and makes it findable.
void Register(const std::shared_ptr<Pool>& pool);
void Unregister(std::int32_t id);
Status Find(const char* op, std::int32_t id, std::shared_ptr<Pool>* out);
// Explains why a program on a device did not find its pool: it is closed, never existed, or is on another device.
Status NotHere(const std::string& op, std::int32_t id);

// Called when a program addresses blocks by number on this device. A handler does not know its pool, so every pool on
// the device opens its block table (Pool::OpenTable), and so do those created later (device_tables_wanted). If one
// fails, only its own programs fail, and the next call tries again. Does nothing once all have tables. Does not touch
// pools of other devices, whose host calls may wait for programs that wait for this handler.
void OpenDeviceTables(int device);
bool device_tables_wanted(int device);
bool device_tables_open(int device);  // whether OpenDeviceTables has nothing to do

}  // namespace kvpage

#endif  // KVPAGE_CACHE_REGISTRY_H_
