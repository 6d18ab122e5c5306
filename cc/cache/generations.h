// The host calls that wait for programs: a new generation, waiting for slots to drain, closing.
#ifndef KVPAGE_CACHE_GENERATIONS_H_
#define KVPAGE_CACHE_GENERATIONS_H_

#include "cache/parts.h"

namespace kvpage::generations {

// Waits for running handlers, makes every older cache stale and ends all draining.
Status Start(const PoolParts& pool, Generation* out);
// Waits until something has drained, at most `seconds`; false when nothing was draining or time ran out.
bool WaitForDrain(const PoolParts& pool, double seconds);
// Refuses new work and waits for running handlers.
void Close(const PoolParts& pool);

}  // namespace kvpage::generations

#endif  // KVPAGE_CACHE_GENERATIONS_H_
