"""Programs of `test_process_endings.py`: processes that diverge, stop or are interrupted."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mesh_rig import check_equal, make_pool, write

import jax_kvpage as kvp


@contextlib.contextmanager
def _pool() -> Iterator[tuple[kvp.KVPool, kvp.KVCache, int]]:
    with make_pool(len(jax.devices()), 4, max_slots=6) as pool:
        slot, cache = pool.acquire(pool.cache(), 40)
        yield pool, write(pool, cache, slot, range(10)), slot
        check_equal(pool)
        before = pool.slot_table()
        with pytest.raises(kvp.KVPageError):  # the error is permanent
            pool.extend(slot, 100)
        assert pool.slot_table() == before


def divergence() -> None:
    """Calls that differ between processes raise an error everywhere, which names them."""
    here = jax.process_index()
    with _pool() as (pool, cache, slot):  # a different call
        wanted = r"0: .*extend\(\[0\], \[70\]\); .*1: .*acquire\(\[8"
        with pytest.raises(kvp.KVPageError, match=wanted):
            pool.acquire(cache, 8) if here else pool.extend(slot, 70)
    with _pool() as (pool, cache, _):  # a different argument
        wanted = r"0: .*acquire\(\[70\]\); .*1: .*acquire\(\[71\]"
        with pytest.raises(kvp.KVPageError, match=wanted):
            pool.acquire(cache, 70 + here)
    with _pool() as (pool, cache, slot):  # a different order of calls that do not communicate
        for ids in ([1], [2]) if here else ([2], [1]):
            pool.commit(slot, ids)
        wanted = r"0: .*commit\(0, \[2\]\).*commit\(0, \[1\]\).*1: .*commit\(0, \[1\]\)"
        with pytest.raises(kvp.KVPageError, match=wanted):
            pool.acquire(cache, 70)
    with _pool() as (pool, cache, slot):  # one more call
        if here:
            cache = pool.release(cache, slot)
        with pytest.raises(kvp.KVPageError, match=r"1: .*release\(\[\(1, 0"):
            pool.check(cache)
    with _pool() as (pool, cache, slot):  # a program that could not be queued
        with pytest.MonkeyPatch.context() as patch:
            if here:
                patch.setattr(pool._queue, "call", _fail)
            with pytest.raises(RuntimeError, match="injected") if here else _nothing():
                _, cache = pool.acquire(cache, 20)
        with pytest.raises(kvp.KVPageError, match=r"different calls.*1: undo\("):
            pool.check(cache)


def _fail(*args: Any) -> Any:
    raise RuntimeError("injected")


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def absence() -> None:
    """A process that is late or has gone is not waited for forever. Waits 3 or 4.3 s."""
    here = jax.process_index()
    for absent in (0, 1):
        with _pool() as (pool, cache, _):
            together = time.monotonic() + 7
            if here == absent:
                time.sleep(7)
            begin = time.monotonic()
            if here == absent == 0:  # it is late, and only learns now that process 1 has gone
                _, cache = pool.acquire(cache, 70)
            with pytest.raises(kvp.KVPageError, match=f"process {absent} has not made this call"):
                pool.acquire(cache, 70)
            assert time.monotonic() - begin < 6.5
            time.sleep(max(together - time.monotonic(), 0))
    for absent in (0, 1):
        with make_pool(len(jax.devices()), 4) as pool:
            cache = pool.cache()
            if here == absent:
                continue  # leaving the `with` block closes the pool
            with pytest.raises(kvp.KVPageError, match=f"process {absent} closed the pool"):
                pool.acquire(cache, 70)


def interrupts() -> None:
    """Ctrl-C in one process while it waits for the other."""
    for interrupted in (0, 1):
        with _pool() as (pool, cache, _):
            if jax.process_index() == interrupted:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                with pytest.raises(KeyboardInterrupt):
                    pool.acquire(cache, 70)
            else:
                time.sleep(2)
                with contextlib.suppress(kvp.KVPageError):
                    _, cache = pool.acquire(cache, 70)
            with pytest.raises(kvp.KVPageError, match=r"interrupt|KeyboardInterrupt"):
                pool.check(cache)


def work() -> None:
    """Runs steps with decisions and collectives forever."""
    with make_pool(len(jax.devices()), 4, max_slots=6) as pool:
        assert pool.sharding is not None
        mesh = pool.sharding.mesh
        x = pool._queue.put(np.ones(4, np.float32))
        add = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, "tp") / 2, mesh=mesh, in_specs=P(), out_specs=P()
            )
        )
        cache = pool.cache()
        for count in itertools.count():
            slot, cache = pool.acquire(cache, 8)
            for length in range(0, 64, 8):
                pool.extend(slot, length + 8)
                cache = write(pool, cache, slot, range(8))
                x = add(x)
            np.asarray(x)
            cache = pool.release(cache, slot)
            if count == 1:
                print("working", flush=True)
