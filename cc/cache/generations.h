// Host calls that wait for programs: starting a generation, waiting for slots to drain, closing.
#ifndef KVPAGE_CACHE_GENERATIONS_H_
#define KVPAGE_CACHE_GENERATIONS_H_

#include "cache/parts.h"
#include "cache/patience.h"

namespace kvpage::generations {

// Waits for running handlers, makes every older cache stale and ends all draining. If `go_on` ends the wait, nothing
// has changed.
Status Start(const PoolParts& pool, Generation* out, const GoOn& go_on);
// Waits up to `seconds` until something has drained; returns false if nothing was draining or the time ran out.
bool WaitForDrain(const PoolParts& pool, double seconds);
// Rejects new work and waits for running handlers. If `go_on` ends the wait, the pool is already closed, and the call
// may be repeated to wait for the rest.
Status Close(const PoolParts& pool, const GoOn& go_on);

}  // namespace kvpage::generations

#endif  // KVPAGE_CACHE_GENERATIONS_H_
