"""Dispatch cost that this package's ops add to a jitted step with many parameter arrays.

JAX keeps a program on its fast dispatch path only if nothing in it has an effect; our ops have
none. To verify this, a step over 300 parameter arrays is called with and without
`update_and_attend` and `advance`, in turns, so that both see the same machine. Only the call is
timed, not the computation that it starts: both steps contain a matrix product that is large enough
for XLA to run them on another thread instead of inside the call.

    python benchmarks/dispatch.py [--parameters 300] [--calls 2000] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jax_kvpage as kvp

TARGET = 1.3
_LAYERS, _HEADS, _DIM, _WIDTH = 2, 2, 64, 192


def _mix(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """Uses every parameter, so that none is dropped from the program's arguments."""
    work = params[0] @ params[0]
    return x + work[0, 0] + sum(p[0] for p in params[1:])


@jax.jit
def plain_step(
    params: list[jax.Array],
    cache: tuple[jax.Array, ...],
    batch: tuple[jax.Array, ...],
    x: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The step without the ops: the same arguments and results, with the state passed through."""
    handle, epoch, lengths = cache
    slots, _ = batch
    for _ in range(_LAYERS):
        x = jnp.tanh(_mix(params, x))
    return x, (handle, epoch + 1, lengths.at[slots].add(1))


@jax.jit
def kvpage_step(
    params: list[jax.Array], cache: kvp.KVCache, batch: kvp.Batch, x: jax.Array
) -> tuple[jax.Array, kvp.KVCache]:
    """The step with a cache: one op per layer, and one to advance."""
    for layer in range(_LAYERS):
        x = jnp.tanh(_mix(params, x))
        x, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
    return x, kvp.advance(cache, batch)


def _timed(call: Callable[[], object], calls: int) -> float:
    """Microseconds per call, without the wait for its result."""
    spent = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        result = call()
        spent += time.perf_counter() - start
        jax.block_until_ready(result)
    return spent / calls * 1e6


def measure(num_parameters: int, calls: int, calls_per_round: int = 5) -> dict[str, float]:
    """Times both steps in short, interleaved rounds.

    The best rounds are compared, as `timeit` recommends: other load on the machine can only make
    rounds slower. Medians are reported too.
    """
    params = [jnp.full((_WIDTH, _WIDTH), 1e-3)]
    params += [jnp.full((8,), 1e-3) for _ in range(num_parameters - 1)]
    spec = kvp.CacheSpec(_LAYERS, _HEADS, _DIM, 4, 512, dtype=jnp.float32)
    x = jnp.ones((2, _HEADS, _DIM))
    # Every step starts from the same cache: sequences stay short, so that the cost of attention is
    # negligible.
    with kvp.KVPool(spec, "16MiB", on_stale="allow") as pool:
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        batch = kvp.Batch.decode(slots)
        arrays = (cache.handle, cache.epoch, cache.lengths)
        pair = (batch.slots, batch.query_offsets)

        def plain() -> object:
            return plain_step(params, arrays, pair, x)

        def ours() -> object:
            return kvpage_step(params, cache, batch, x)

        for call in (plain, ours):
            _timed(call, 20)
        plain_times, our_times = [], []
        for _ in range(max(calls // calls_per_round, 1)):
            plain_times.append(_timed(plain, calls_per_round))
            our_times.append(_timed(ours, calls_per_round))
    return {
        "parameters": num_parameters,
        "plain_us": min(plain_times),
        "kvpage_us": min(our_times),
        "ratio": min(our_times) / min(plain_times),
        "plain_median_us": statistics.median(plain_times),
        "kvpage_median_us": statistics.median(our_times),
        "target": TARGET,
    }


def main() -> None:
    """Prints a table and, last, the same figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    arguments = parser.parse_args()
    result = measure(arguments.parameters, arguments.calls)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'us per call':<20}{'best round':>12}{'median':>12}")
    for name, key in (("without the ops", "plain"), ("with the ops", "kvpage")):
        print(f"{name:<20}{result[key + '_us']:>12.1f}{result[key + '_median_us']:>12.1f}")
    print(f"ratio {result['ratio']:.2f} with {arguments.parameters} parameters, target {TARGET}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
