"""Swapping when things fail: programs, disks, signals, and the end of pools and processes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import busy
from prefix_rig import text
from store_rig import soon
from swap_rig import SwapRig, swap_files, swap_rig

import jax_kvpage as kvp


def test_a_failed_program_and_a_new_generation(store, make_pool) -> None:
    rig = swap_rig(make_pool, store, "per_layer")
    slot, other = rig.begin(text(40)), rig.begin(text(20, 1))
    rig.pool.check(rig.cache)
    back = rig.swap_out(other)
    assert rig.pool.prefetch(back).wait()
    batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, 1]))
    row = jnp.ones((1, 2, 64))
    append = jax.jit(lambda cache, layer: kvp.append_kv(cache, row, row, batch, layer=layer))
    rig.cache = append(kvp.after(rig.cache, busy(1)), jnp.int32(7))  # no such layer
    rig.pool.commit(slot, [1, 2, 3])
    swapped = rig.swap_out(slot, to_disk=False)
    again = rig.swap_in(back, wait=False)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="layer"):
        rig.swap_in(swapped)
    rig.cache = rig.pool.cache()
    assert np.asarray(rig.cache.lengths)[again] == 20
    assert swapped.tokens == 40
    rig.swap_in(swapped, wait=False)
    rig.check()
    rig.audit()


def test_a_pool_closes_with_swapped_sequences(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    swapped = rig.swap_out(rig.begin(text(40)))
    queued = rig.swap_out(rig.begin(text(30)), to_disk=False)
    rig.pool.close()
    assert swapped.closed
    assert queued.closed
    assert soon(lambda: list(swap_files()) == [])
    swapped.close()
    with pytest.raises(kvp.PoolClosed):
        rig.pool.prefetch(swapped)


def test_the_disk_is_full(tmp_path: pathlib.Path, make_pool, layout: str) -> None:
    with kvp.BlockStore(tmp_path, limit=4096) as store:
        rig = swap_rig(make_pool, store, layout)
        swapped = rig.swap_out(rig.begin(text(100)), to_disk=False)
        assert soon(lambda: store.stats().failed_writes == 1)
        assert "do not fit in a store of 4096" in store.stats().last_error
        assert soon(lambda: rig.audit().blocks_draining == 0)
        assert rig.audit().blocks_mapped == 7 * rig.pool.spec.num_ranges
        ticket = rig.pool.prefetch(swapped)
        assert (ticket.ready, ticket.tokens) == (True, 100)
        rig.swap_in(swapped, wait=False)
        rig.check()
        rig.pool.close()


@pytest.mark.parametrize("tokens", [5, 96, 100])
@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_swapped_in_can_be_evicted(
    store, make_pool, layout: str, tokens: int, on_disk: bool
) -> None:
    """Its blocks may have stayed in memory, where the prefix cache also holds them."""
    rig = swap_rig(make_pool, store, layout, blocks=32)
    slot, _ = rig.acquire(text(tokens))
    slot = rig.swap_in(rig.swap_out(slot, to_disk=on_disk))
    rig.check()
    rig.release(slot)
    assert rig.pool.find_prefix(text(tokens), whole=True) == tokens
    rig.pool.evict()
    assert rig.audit().blocks_cached == 0
    rig.begin(text(512))  # takes all of the memory
    rig.check()


def test_damaged_files(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    parent = rig.begin(text(40))
    child = rig.fork(parent)
    rig.write(child, text(100, 2))
    swapped = rig.swap_out(child)
    (path,) = swap_files()
    offset = 3 * rig.pool.spec.num_ranges * rig.pool.spec.block_bytes + 5
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(kvp.KVPageError, match=r"\(damaged\): the first 80 of 140 tokens are"):
        rig.swap_in(swapped)
    ticket = rig.pool.prefetch(swapped)
    assert (ticket.ready, ticket.tokens) == (True, 80)
    assert "damaged" in ticket.error
    assert repr(ticket).startswith("<Ticket 80 tokens, what was written")
    assert store.stats().missed == {"damaged": 1}
    stats = rig.audit()
    assert stats.blocks_swapped == 5 * rig.pool.spec.num_ranges
    slot, rig.cache = rig.pool.swap_in(rig.cache, swapped, recover=True)
    rig.ids[slot] = rig.away.pop(swapped)[:80]
    assert rig.audit().blocks_swapped == 0
    rig.write(slot, text(50, 3))
    rig.check()


def test_truncated_files(store, make_pool) -> None:
    rig = swap_rig(make_pool, store, "fused")
    swapped = rig.swap_out(rig.begin(text(40)))
    (path,) = swap_files()
    with open(path, "r+b") as file:
        file.truncate(rig.pool.spec.block_bytes)
    with pytest.raises(kvp.KVPageError, match=r"\(truncated\): the first 0 of 40 tokens"):
        rig.swap_in(swapped)


class _Interrupted:
    """A native pool whose method `name` does its work and then raises, as a signal handler may."""

    def __init__(self, pool, name: str) -> None:
        self._pool, self._name = pool, name

    def __getattr__(self, name: str):
        method = getattr(self._pool, name)
        if name != self._name:
            return method

        def call(*args):
            method(*args)
            raise KeyboardInterrupt

        return call


def interrupt(patch: pytest.MonkeyPatch, rig: SwapRig, where: str) -> None:
    """Makes a call raise KeyboardInterrupt after it has done its work."""
    if where == "program":
        run = rig.pool._queue.run

        def call(*args):
            run(*args)
            raise KeyboardInterrupt

        patch.setattr(rig.pool._queue, "run", call)
    else:
        patch.setattr(rig.pool, "_pool", _Interrupted(rig.pool._pool, where))


@pytest.mark.parametrize("where", ["swap_out", "program"])
def test_an_interrupted_swap_out(store, make_pool, monkeypatch, where: str) -> None:
    rig = swap_rig(make_pool, store, "fused")
    slot = rig.begin(text(40))
    rig.pool.check(rig.cache)
    with monkeypatch.context() as patch:
        interrupt(patch, rig, where)
        with pytest.raises(KeyboardInterrupt):
            rig.pool.swap_out(rig.cache, slot)
    rig.cache = rig.pool.cache()
    stats = rig.audit()
    assert (stats.sequences_swapped, stats.slots_draining) == (0, 0)
    assert soon(lambda: store.stats().bytes_swapped == 0)
    if where == "program":  # the program may have run, as for a release
        assert stats.slots_occupied in (0, 1)
        return
    rig.check()
    rig.swap_in(rig.swap_out(slot))
    rig.check()


@pytest.mark.parametrize("where", ["prefetch_swapped", "swap_in", "program"])
def test_an_interrupted_swap_in(store, make_pool, monkeypatch, where: str) -> None:
    rig = swap_rig(make_pool, store, "fused")
    parent = rig.begin(text(40))
    swapped = rig.swap_out(rig.fork(parent))
    with monkeypatch.context() as patch:
        interrupt(patch, rig, where)
        with pytest.raises(KeyboardInterrupt):
            rig.pool.swap_in(rig.cache, swapped, wait=True)
    rig.cache = rig.pool.cache()
    assert (rig.audit().sequences_swapped, rig.pool.stats().slots_occupied) == (1, 1)
    assert rig.swap_in(swapped) != parent
    rig.check()
    assert rig.audit().sequences_swapped == 0


def test_a_forked_child_leaves_the_parents_sequences_alone(store, make_pool) -> None:
    rig = swap_rig(make_pool, store, "fused")
    swapped = rig.swap_out(rig.begin(text(40)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own warning about os.fork and threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            swapped.close()  # does nothing
            rig.pool.prefetch(swapped)
        except kvp.PoolClosed:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    rig.swap_in(swapped)
    rig.check()


def test_threads_swap_at_once(store, make_pool, layout: str) -> None:
    """Many sequences are read and written while others are swapped."""
    rig = swap_rig(make_pool, store, layout, blocks=24)
    failures: list[BaseException] = []
    stop = threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                rig.audit()
                rig.pool.stats()
                store.stats()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        away = [rig.swap_out(rig.begin(text(60, seed)), to_disk=False) for seed in range(12)]
        for round_number in range(2):
            for swapped in away[: 3 * round_number]:
                with contextlib.suppress(kvp.OutOfBlocks):  # the others have not drained yet
                    rig.pool.prefetch(swapped)
            away = [rig.swap_out(rig.swap_in(swapped), to_disk=False) for swapped in away]
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    for swapped in away:
        slot = rig.swap_in(swapped)
        rig.check()
        rig.release(slot)
    stats = rig.audit()
    assert stats.blocks_mapped == stats.blocks_draining == stats.blocks_swapped == 0
