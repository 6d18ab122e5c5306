"""Exceptions from signal handlers during host calls, and waits that could never end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from harness import RUN_TIME_ERRORS, busy, make_batch
from pool_checks import check_totals, count_blocks, drained, make_spec
from subprocesses import run_python

import jax_kvpage as kvp


class _Interrupted:
    """A native pool whose method `name` does its work and then raises, as a signal handler may."""

    def __init__(self, pool: Any, name: str) -> None:
        self._pool, self._name = pool, name

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pool, name)
        if name != self._name:
            return method

        def call(*args: Any) -> None:
            method(*args)
            raise KeyboardInterrupt

        return call


def _raising(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> None:
        function(*args)
        raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("where", ["acquire", "program"])
def test_an_interrupted_acquire_leaves_no_slot(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pool = make_pool(make_spec())
    cache = pool.cache()
    with monkeypatch.context() as patch:
        if where == "program":
            patch.setattr(pool._queue, "run", _raising(pool._queue.run))
        else:
            patch.setattr(pool._native, "pool", _Interrupted(pool._pool, where))
        with pytest.raises(KeyboardInterrupt):
            pool.acquire(cache, [20, 40])
    assert pool.slot_table() == []
    assert check_totals(pool).blocks_mapped == 0
    slots, cache = pool.acquire(pool.cache(), [20] * 6)
    assert sorted(slots) == list(range(6))
    assert drained(cache).lengths.tolist() == [0] * 6


@pytest.mark.parametrize("where", ["start_edits", "program"])
def test_an_interrupted_release_does_not_drain_for_ever(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pool = make_pool(make_spec())
    slot, cache = pool.acquire(pool.cache(), 20)
    with monkeypatch.context() as patch:
        if where == "program":
            patch.setattr(pool._queue, "run", _raising(pool._queue.run))
        else:
            patch.setattr(pool._native, "pool", _Interrupted(pool._pool, where))
        with pytest.raises(KeyboardInterrupt):
            pool.release(cache, slot)
    assert not any(row.draining for row in pool.slot_table())
    cache = pool.cache()
    if cache.lengths[slot] >= 0:
        cache = pool.release(cache, slot)
    drained(cache)
    assert pool.stats().slots_occupied == pool.stats().slots_draining == 0


def test_alarms_at_any_moment_lose_no_slot() -> None:
    """Real signals: the caller always knows every slot that the pool considers occupied."""
    done = run_python(
        """
        import random, signal
        import jax, jax.numpy as jnp
        import jax_kvpage as kvp

        class Alarm(BaseException):
            pass

        def ring(*args):
            raise Alarm

        signal.signal(signal.SIGALRM, ring)
        pool = kvp.KVPool(kvp.CacheSpec(1, 1, 16, 8, 64, dtype=jnp.float32), "1MiB")
        slot, cache = pool.acquire(pool.cache(), 16)
        cache = pool.release(cache, slot)
        chance = random.Random(1)
        rung = lost = 0
        for _ in range(3000):
            cache = pool.cache()
            slot = None
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(5e-6, 3e-4))
                slot, cache = pool.acquire(cache, 16)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                rung += 1
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for _ in range(3):  # Python calls the handler of a late alarm here
                    pass
            except Alarm:
                rung += 1
            held = [row.slot for row in pool.slot_table() if not row.draining]
            # The alarm may have come after the call: then the caller has the slot.
            lost += held != ([] if slot is None else [slot])
            if held:
                cache = jax.block_until_ready(pool.release(pool.cache(), held))
        print("rung", rung)
        assert not lost, lost
        assert rung > 300, rung
        """
    )
    assert "rung" in done.stdout


@pytest.mark.parametrize("what", ["blocks", "slots"])
def test_waiting_for_what_the_caller_itself_holds(make_pool: Any, what: str) -> None:
    spec = make_spec("per_layer", max_slots=2).resolve("cpu")
    pool = make_pool(spec, 40 * count_blocks(spec, 16) * spec.block_bytes)
    slots, cache = pool.acquire(pool.cache(), [16 * 20, 16])
    view = pool.view(0, slots[0])
    cache = drained(pool.release(cache, slots[0]))
    wanted = 16 if what == "slots" else 16 * 30
    if what == "blocks":
        cache = drained(pool.release(cache, slots[1]))
    with pytest.raises(kvp.OutOfBlocks, match=rf"pool.view.*\[{slots[0]}\]"):
        pool.acquire(cache, wanted, wait=True)
    del view
    slot, cache = pool.acquire(cache, wanted, wait=True)
    assert int(cache.lengths[slot]) == 0


def test_waiting_behind_a_view_for_another_release(make_pool: Any) -> None:
    pool = make_pool(make_spec("per_layer", max_slots=2))
    slots, cache = pool.acquire(pool.cache(), [16, 16])
    view = pool.view(0, slots[0])
    cache = pool.release(cache, slots[0])
    cache = pool.release(kvp.after(cache, busy(1)), slots[1])
    slot, cache = pool.acquire(cache, 16, wait=True)
    assert slot == slots[1]
    del view


def test_waiting_for_a_failed_release_behind_one_that_succeeded(make_pool: Any) -> None:
    pool = make_pool(make_spec(max_slots=2))
    slots, cache = pool.acquire(pool.cache(), [16, 16])
    twice = make_batch([(slots[0], 1), (slots[0], 1)])
    bad = kvp.advance(kvp.after(cache, busy(1)), twice)
    failed = pool.release(bad, slots[0])
    with pytest.raises(RUN_TIME_ERRORS, match="twice"):
        jax.block_until_ready(failed)
    newer = pool.release(cache, slots[1])
    slot, newer = pool.acquire(newer, 16, wait=True)
    assert slot == slots[1]
    with pytest.raises(RUN_TIME_ERRORS, match="twice"):
        pool.acquire(newer, 16, wait=True)
    cache = pool.cache()
    slot, _ = pool.acquire(cache, 16, wait=True)
    assert slot == slots[0]


@pytest.mark.parametrize("call", ["cache", "view", "close"])
def test_a_wait_for_a_running_op_is_interrupted(call: str) -> None:
    done = run_python(
        """
        import signal, sys, threading, time
        import jax, jax.numpy as jnp
        import jax_kvpage as kvp
        from harness import make_batch

        class Alarm(BaseException):
            pass

        def ring(*args):
            raise Alarm

        signal.signal(signal.SIGALRM, ring)
        N = 4096
        spec = kvp.CacheSpec(1, 8, 128, 2, N, dtype=jnp.float32, layout="per_layer")
        pool = kvp.KVPool(spec, spec.resolve("cpu").slot_bytes)
        slot, cache = pool.acquire(pool.cache(), N)
        batch = make_batch([(slot, N)])
        q, k = jnp.ones((N, 32, 128)), jnp.ones((N, 8, 128))
        step = jax.jit(lambda cache: kvp.update_and_attend(q, k, k, cache, batch, layer=0))
        step = step.lower(cache).compile()
        # JAX runs so small a program while it is dispatched.
        thread = threading.Thread(target=lambda: jax.block_until_ready(step(cache)))
        begin = time.process_time()
        _, cache = jax.block_until_ready(step(cache))
        wanted = 0.3 * (time.process_time() - begin)
        begin = time.process_time()
        thread.start()
        while time.process_time() < begin + wanted:  # the op is at work, however busy others are
            time.sleep(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            pool.view(0, slot) if sys.argv[1] == "view" else getattr(pool, sys.argv[1])()
            print("no alarm")
        except Alarm:
            print("alarm, op still at work:", thread.is_alive())
        assert pool.closed == (sys.argv[1] == "close")
        signal.setitimer(signal.ITIMER_REAL, 0)
        pool.close()
        thread.join()
        """,
        call,
    )
    assert "alarm, op still at work: True" in done.stdout


def test_reading_threads_starve_no_host_call() -> None:
    done = run_python(
        """
        import threading, time
        import jax, jax.numpy as jnp
        import jax_kvpage as kvp
        from harness import make_batch

        spec = kvp.CacheSpec(1, 8, 128, 2, 4096, dtype=jnp.float32, layout="per_layer")
        pool = kvp.KVPool(spec, 2 * spec.resolve("cpu").slot_bytes)
        slot, cache = pool.acquire(pool.cache(), 4096)
        batch, x = make_batch([(slot, 4000)]), jnp.ones((4000, 8, 128))
        cache = kvp.advance(kvp.append_kv(cache, x, x, batch, layer=0), batch)
        jax.block_until_ready(cache)
        q = jnp.ones((300, 8, 128))
        back = kvp.set_lengths(cache, jnp.asarray([slot]), jnp.asarray([3700]))
        batch = make_batch([(slot, 300)])
        back = kvp.append_kv(back, x[:300], x[:300], batch, layer=0)
        read = jax.jit(lambda cache: kvp.paged_attention(q, cache, batch, layer=0))
        jax.block_until_ready(read(back))
        stop = threading.Event()

        def work():
            while not stop.is_set():
                try:
                    jax.block_until_ready(read(back))
                except Exception as error:
                    assert "generation" in str(error), error
                    return

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        limit = threading.Timer(30, stop.set)
        limit.daemon = True
        limit.start()
        time.sleep(0.2)
        for call in (lambda: pool.view(0, slot), pool.stats, pool.cache):
            call()
            assert not stop.is_set(), "the call came when the readers had stopped"
        stop.set()
        for thread in threads:
            thread.join()
        print("all came")
        """
    )
    assert "all came" in done.stdout
