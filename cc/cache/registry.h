// Registry: pool ids, as programs carry them, to pools.
//
// Ids are positive and never reused, so a program queued behind a close fails instead of writing into another
// pool. They begin at a random number in every process: a cache that was pickled in another one names a pool
// that is not here. The registry is never destroyed: programs may still be running when the process exits.
#ifndef KVPAGE_CACHE_REGISTRY_H_
#define KVPAGE_CACHE_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "cache/pool.h"

namespace kvpage {

// Gives the pool its id and makes it findable.
void Register(const std::shared_ptr<Pool>& pool);
void Unregister(std::int32_t id);
Status Find(const char* op, std::int32_t id, std::shared_ptr<Pool>* out);
// Why a program on a device did not find its pool there: it is closed, it never was, or it lives on another device.
Status NotHere(const std::string& op, std::int32_t id);

// Some program addresses blocks by number on this device. A handler does not know the pool that it is for, so every
// pool there opens its block table (Pool::OpenTable), and those that are made from now on do too
// (device_tables_wanted). Where one cannot, only its own programs fail, and the next call tries again. Nothing happens
// once all have tables. Pools of other devices are left alone: their host calls may wait for programs that wait for
// this handler.
void OpenDeviceTables(int device);
bool device_tables_wanted(int device);
bool device_tables_open(int device);  // OpenDeviceTables has nothing to do

}  // namespace kvpage

#endif  // KVPAGE_CACHE_REGISTRY_H_
