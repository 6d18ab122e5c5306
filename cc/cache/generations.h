// The host calls that wait for programs: a new generation, waiting for slots to drain, closing.
#ifndef KVPAGE_CACHE_GENERATIONS_H_
#define KVPAGE_CACHE_GENERATIONS_H_

#include "cache/parts.h"
#include "cache/patience.h"

namespace kvpage::generations {

// Waits for running handlers, makes every older cache stale and ends all draining. A wait that `go_on` ends has changed
// nothing.
Status Start(const PoolParts& pool, Generation* out, const GoOn& go_on);
// Waits until something has drained, at most `seconds`; false when nothing was draining or time ran out.
bool WaitForDrain(const PoolParts& pool, double seconds);
// Refuses new work and waits for running handlers. When `go_on` ends the wait the pool is closed already, and the call
// may be made again to wait for the rest.
Status Close(const PoolParts& pool, const GoOn& go_on);

}  // namespace kvpage::generations

#endif  // KVPAGE_CACHE_GENERATIONS_H_
