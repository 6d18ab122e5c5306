"""Two threads, a forked child, exits at awkward moments, and pools that are dropped or closed at
awkward moments.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, busy, make_batch
from subprocesses import run_python

import jax_kvpage as kvp


def _spec(layout: str = "fused", max_slots: int = 6) -> kvp.CacheSpec:
    return kvp.CacheSpec(2, 2, 64, max_slots, 512, dtype=jnp.float32, layout=layout)


def _in_threads(*calls: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_two_pools_in_two_threads(make_pool) -> None:
    def work(rig: Rig) -> Callable[[], None]:
        def run() -> None:
            for i in range(15):
                slots = [rig.acquire(80), rig.acquire(30 + i)]
                rig.write({slots[0]: 50 + i, slots[1]: 20 + i})
                out, _, want, _ = rig.step([(slots[0], 10), (slots[1], 3)])
                np.testing.assert_allclose(out, want, atol=1e-4)
                rig.release(*slots)

        return run

    _in_threads(*[work(Rig(make_pool(_spec()), seed=seed)) for seed in range(2)])


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_host_calls_beside_running_steps(make_pool, layout: str) -> None:
    """One thread maps, unmaps and inspects while programs of another thread read and write: the
    memory of those programs does not change.
    """
    pool = make_pool(_spec(layout), "24MiB", poison=True)
    rig = Rig(pool, max_tokens=32)
    slots = [rig.acquire(512), rig.acquire(100)]
    spare = rig.acquire(16)
    done = threading.Event()

    def steps() -> None:
        try:
            for _ in range(40):
                rig.write({slots[0]: 4})
                out, _, want, _ = rig.step([(slots[0], 4), (slots[1], 1)])
                np.testing.assert_allclose(out, want, atol=1e-4)
        finally:
            done.set()

    def host() -> None:
        tokens = 16
        while not done.is_set():
            tokens = tokens % 500 + 16
            pool.extend(spare, tokens)
            pool.trim()
            stats = pool.stats()
            used = stats.blocks_mapped + stats.blocks_parked + stats.blocks_draining
            assert used + stats.blocks_free == stats.blocks_total
            assert len(pool.slot_table()) == stats.slots_occupied == 3
            pool.block_map(slots[0])

    _in_threads(steps, host, host)
    rig.check_lengths()


def test_racing_mutators(make_pool) -> None:
    """Both threads hold the same cache: one wins, the other is told that its cache is stale, and
    the pool continues.
    """
    pool = make_pool(_spec())
    slot, start = pool.acquire(pool.cache(), 512)
    k = jnp.ones((4, 2, 64))

    @jax.jit
    def step(cache: kvp.KVCache) -> kvp.KVCache:
        for layer in range(2):
            cache = kvp.append_kv(cache, k, k, make_batch([(slot, 4)]), layer=layer)
        return kvp.advance(cache, make_batch([(slot, 4)]))

    cache = jax.block_until_ready(step(start))
    for _ in range(10):
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def race(cache: kvp.KVCache, barrier: threading.Barrier, outcomes: list[str]) -> None:
            barrier.wait()
            try:
                jax.block_until_ready(step(cache))
                outcomes.append("done")
            except RUN_TIME_ERRORS as error:
                outcomes.append("stale" if "stale" in str(error) else str(error))

        _in_threads(*[functools.partial(race, cache, barrier, outcomes)] * 2)
        # Each may have stopped the other midway, but both can never have succeeded.
        assert sorted(outcomes) in (["done", "stale"], ["stale", "stale"])
        cache = pool.cache()
        assert int(cache.lengths[slot]) == (8 if "done" in outcomes else 4)
        cache = kvp.set_lengths(cache, jnp.asarray([slot]), jnp.asarray([4], jnp.int32))
        jax.block_until_ready(cache)


def test_accounting_is_atomic_between_threads(make_pool) -> None:
    """Two threads extend slots of one pool up to the last block: the blocks handed out add up."""
    pool = make_pool(_spec("fused", 4), 40 * _spec().resolve("cpu").block_bytes)
    slots, _ = pool.acquire(pool.cache(), [1, 1, 1, 1])

    def grow(slot: int) -> Callable[[], None]:
        def run() -> None:
            for tokens in range(1, 513, 7):
                try:
                    pool.extend(slot, tokens)
                except kvp.OutOfBlocks:
                    return

        return run

    _in_threads(*map(grow, slots))
    stats = pool.stats()
    owned = [block for slot in slots for row in pool.block_map(slot) for block, _ in row]
    assert len(owned) == len(set(owned)) == stats.blocks_mapped <= stats.blocks_total


def test_after_fork() -> None:
    """The child is told that the pool belongs to its parent; the parent does not notice."""
    done = run_python(
        """
        import os, sys, warnings
        import jax, jax.numpy as jnp, numpy as np
        import jax_kvpage as kvp
        from harness import Rig

        warnings.simplefilter("ignore")  # jax's own, about os.fork and its threads
        pool = kvp.KVPool(kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32), "8MiB")
        rig = Rig(pool)
        slot = rig.acquire(100)
        rig.write({slot: 60})
        jax.block_until_ready(rig.cache)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            text = ""
            for call in (pool.stats, lambda: pool.extend(slot, 200), pool.trim, pool.slot_table):
                try:
                    call()
                    text += "no error\\n"
                except kvp.PoolClosed as error:
                    text += f"{error}\\n"
            pool.close()
            os.write(writer, text.encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        messages = os.read(reader, 10000).decode().splitlines()
        assert len(messages) == 4 and all("fork" in m for m in messages), messages
        out, _, want, _ = rig.step([(slot, 20)])
        np.testing.assert_allclose(out, want, atol=1e-4)
        pool.extend(slot, 200)
        rig.write({slot: 100})
        pool.close()
        print("parent fine")
        """
    )
    assert "parent fine" in done.stdout


_IN_FLIGHT = """
    import sys
    import jax, jax.numpy as jnp
    import jax_kvpage as kvp
    from harness import busy, make_batch

    spec = kvp.CacheSpec(2, 2, 64, 4, 4096, dtype=jnp.float32, layout="per_layer")
    pool = kvp.KVPool(spec, "64MiB")
    slots, cache = pool.acquire(pool.cache(), [4000, 4000])
    batch = make_batch([(slot, 1) for slot in slots])
    x = jnp.ones((2, 2, 64))

    @jax.jit
    def steps(cache):
        # Programs as small as the rest are run while they are dispatched.
        cache = kvp.after(cache, busy(1))
        def body(cache, _):
            for layer in range(2):
                out, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
            return kvp.advance(cache, batch), out
        return jax.lax.scan(body, cache, length=3000)

    if "view" in sys.argv:
        view = pool.view(0)
    if "behind" in sys.argv:
        cache = kvp.after(cache, busy(2))
    cache, out = steps(cache)
    cache = pool.release(cache, slots[0])
    print("in flight", not out.is_ready())
"""


@pytest.mark.parametrize("how", ["plain", "view", "behind", "raise", "del"])
def test_exit_with_programs_in_flight(how: str) -> None:
    code = _IN_FLIGHT
    if how == "del":
        code += "    del pool, cache, out\n"
    if how == "raise":
        code = code.replace(
            "    print(", "    import atexit; atexit.register(lambda: pool.stats())\n    print("
        )
    done = run_python(code, how, timeout=60)
    assert "in flight True" in done.stdout
    assert "Fatal" not in done.stderr
    assert "Segmentation" not in done.stderr


def test_a_collected_pool_warns_and_closes() -> None:
    pool = kvp.KVPool(_spec(), "4MiB")
    slot, cache = pool.acquire(pool.cache(), 20)
    jax.block_until_ready(cache)
    pools = [pool]
    del pool
    with pytest.warns(ResourceWarning, match="close"):
        pools.clear()  # the last reference: no garbage collection needed
    with pytest.raises(RUN_TIME_ERRORS, match=r"(?i)pool"):
        jax.block_until_ready(kvp.advance(cache, make_batch([(slot, 0)])))


def test_close_is_safe_twice(recwarn: pytest.WarningsRecorder) -> None:
    pool = kvp.KVPool(_spec(), "4MiB")
    with pool as entered:
        assert entered is pool
        pool.close()
        pool.close()
    pool.close()
    del pool, entered
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_close_lets_a_running_program_end_and_fails_the_next() -> None:
    pool = kvp.KVPool(_spec(), "4MiB")
    slot, cache = pool.acquire(pool.cache(), 20)
    batch = make_batch([(slot, 1)])
    queued = kvp.advance(kvp.after(cache, busy(1)), batch)
    pool.close()
    with pytest.raises(RUN_TIME_ERRORS, match=r"(?i)pool.*closed"):
        jax.block_until_ready(queued)


def test_many_pools_come_and_go() -> None:
    """Ids are not reused while an old cache is around: using it fails, and never finds the new
    pool.
    """
    old = None
    for _ in range(20):
        with kvp.KVPool(_spec(), "4MiB") as pool:
            slot, cache = pool.acquire(pool.cache(), 20)
            if old is not None:
                with pytest.raises(RUN_TIME_ERRORS, match=r"(?i)pool"):
                    jax.block_until_ready(kvp.advance(old, make_batch([(slot, 0)])))
            old = cache
