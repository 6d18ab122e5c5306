"""In the steady state, a decode step makes no system calls for memory, according to both the pool's
counter and strace.
"""

from __future__ import annotations

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from subprocesses import run_python

import jax_kvpage as kvp

_CALLS = ("mmap", "munmap", "mremap", "madvise", "fallocate", "ftruncate", "mprotect")


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_the_pools_counter_stands_still(make_pool, layout: str) -> None:
    """Slots are reused for similar lengths, so everything a request needs is still mapped from the
    previous one.
    """
    spec = kvp.CacheSpec(2, 2, 64, 8, 1024, dtype=jnp.float32, layout=layout)
    pool = make_pool(spec, "32MiB")
    cache = pool.cache()

    @jax.jit
    def step(cache: kvp.KVCache, slots: jax.Array) -> kvp.KVCache:
        x = jnp.ones((3, 2, 64))
        cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 1)
        batch = kvp.Batch.decode(slots).mask(ok)
        for layer in range(2):
            _, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
        return kvp.advance(cache, batch)

    counts = []
    for wave in range(6):
        slots, cache = pool.acquire(cache, [1, 1, 1])
        for _ in range(200 - 7 * wave):
            cache = step(cache, jnp.asarray(slots, jnp.int32))
        cache = jax.block_until_ready(pool.release(cache, slots))
        counts.append(pool.stats().system_calls)
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 5


_STEPS = """
    import os
    import sys
    import jax, jax.numpy as jnp
    import jax_kvpage as kvp

    spec = kvp.CacheSpec(2, 2, 64, 8, 1024, dtype=jnp.float32, layout=sys.argv[1])
    pool = kvp.KVPool(spec, "32MiB")
    cache = pool.cache()
    x = jnp.ones((3, 2, 64))

    @jax.jit
    def step(cache, slots):
        cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 1)
        batch = kvp.Batch.decode(slots).mask(ok)
        for layer in range(2):
            _, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
        return kvp.advance(cache, batch)

    mark = os.open(os.devnull, os.O_WRONLY)
    for wave in range(6):
        slots, cache = pool.acquire(cache, [1, 1, 1])
        ids = jnp.asarray(slots, jnp.int32)
        if wave == 5:
            calls = pool.stats().system_calls
            os.write(mark, b"steady begin")
        for _ in range(200):
            cache = step(cache, ids)
        jax.block_until_ready(cache)
        if wave == 5:
            os.write(mark, b"steady end")
            assert pool.stats().system_calls == calls
        else:
            cache = jax.block_until_ready(pool.release(cache, slots))
    if len(sys.argv) > 2:  # the control: a step that does map is seen
        os.write(mark, b"growth begin")
        pool.extend(slots[0], 1024)
        os.write(mark, b"growth end")
    pool.close()
"""


_TURNS = """
    import os
    import sys
    import jax, jax.numpy as jnp
    import jax_kvpage as kvp

    spec = kvp.CacheSpec(2, 2, 64, 4, 1024, dtype=jnp.float32, layout=sys.argv[1])
    pool = kvp.KVPool(spec, "32MiB")
    cache = pool.cache()
    x = jnp.ones((1, 100, 2, 64))

    @jax.jit
    def write(cache, batch):
        for layer in range(2):
            _, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
        return kvp.advance(cache, batch)

    mark = os.open(os.devnull, os.O_WRONLY)
    ids = [3 * i + 7 for i in range(400)]
    # The first conversation compiles everything; each asks again, and then goes on.
    for name, first in ("warm-up", 0), ("turns", 5000):
        prompt = [first + token for token in ids]
        slot, cached, cache = pool.acquire_prefix(cache, prompt[:100], 800)
        assert cached == 0
        cache = write(cache, kvp.Batch.padded([slot], [100], 100))
        pool.commit(slot, prompt[:100])
        cache = pool.release(cache, slot)
        pool.check(cache)
        calls = pool.stats().system_calls
        os.write(mark, name.encode() + b" begin")
        # The prompt is repeated; then there are two more turns.
        for asked, found in (100, 99), (200, 100), (300, 200):
            again, cached, cache = pool.acquire_prefix(cache, prompt[:asked], 800)
            assert (again, cached) == (slot, found)
            cache = write(cache, kvp.Batch.padded([slot], [asked - found], 100))
            pool.commit(slot, prompt[found:asked])
            cache = pool.release(cache, slot)
            pool.check(cache)
        os.write(mark, name.encode() + b" end")
        assert pool.stats().system_calls == calls
    slot, _, cache = pool.acquire_prefix(cache, prompt, 800)
    os.write(mark, b"growth begin")  # the control
    pool.extend(slot, 1024)
    os.write(mark, b"growth end")
    pool.close()
"""


def _between(trace: str, name: str) -> list[str]:
    """Returns the memory calls of all threads between two marks."""
    start, end = trace.index(f'"{name} begin"'), trace.index(f'"{name} end"')
    pattern = re.compile(rf"\b({'|'.join(_CALLS)})(\(| resumed)")
    return [line for line in trace[start:end].splitlines() if pattern.search(line)]


def _trace(script: str, folder: pathlib.Path, *arguments: str) -> str:
    """Runs a script under strace; returns its memory calls and its marks."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = folder / "trace"
    trace = ",".join((*_CALLS, "write"))
    run_python(script, *arguments, prefix=("strace", "-f", "-o", str(log), "-e", f"trace={trace}"))
    text = log.read_text()
    assert _between(text, "growth"), "strace did not see the calls of a step that maps"
    return text


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_strace_agrees(tmp_path: pathlib.Path, layout: str) -> None:
    assert _between(_trace(_STEPS, tmp_path, layout, "control"), "steady") == []


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_strace_sees_nothing_of_what_was_cached(tmp_path: pathlib.Path, layout: str) -> None:
    """A repeated prompt, and further turns in a slot that is still parked."""
    assert _between(_trace(_TURNS, tmp_path, layout), "turns") == []
