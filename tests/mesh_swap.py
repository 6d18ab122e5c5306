"""Programs of `test_mesh_swap.py`, which run in a process with eight devices."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import replica_rig
from churning import Churn
from mesh_rig import (
    check_equal,
    check_written,
    make_mesh,
    make_spec,
    write,
    write_each,
)
from store_rig import soon
from swap_rig import swap_files

import jax_kvpage as kvp


def pool_with(
    size: int, store: kvp.BlockStore, capacity: Any = "8MiB", **changes: Any
) -> kvp.KVPool:
    spec = make_spec(4, **changes)
    return kvp.KVPool(spec, capacity, mesh=make_mesh(size), axis="tp", store=store)


def on_disk(store: kvp.BlockStore, *swapped: kvp.Swapped) -> None:
    assert soon(lambda: all(one.on_disk for one in swapped)), store.stats().last_error


def nothing_left(pool: kvp.KVPool, store: kvp.BlockStore) -> None:
    stats = pool.stats()
    assert (stats.sequences_swapped, stats.blocks_swapped) == (0, 0)
    assert soon(lambda: store.stats().bytes_swapped == 0)
    assert not list(swap_files())


def verbs(size: int, path: str, layout: str) -> None:
    """Sequences are swapped out and in on all shards: contents, blocks, files and counts are
    right.
    """
    ids, other = list(range(100, 170)), list(range(500, 600))
    with kvp.BlockStore(path) as store, pool_with(size, store, layout=layout) as pool:
        (slot, kept), cache = pool.acquire(pool.cache(), [70, 100])
        cache = write(pool, cache, slot, ids)
        cache = write(pool, cache, kept, other)
        (fork,), cache = pool.fork(cache, kept, 1)
        pool.extend(fork, 110)
        cache = write(pool, cache, fork, [7, 8])
        before = pool.stats()

        one, cache = pool.swap_out(cache, slot)
        two, cache = pool.swap_out(cache, fork)
        assert (one.tokens, two.tokens) == (70, 102)
        on_disk(store, one, two)
        # One file per device; what the fork shares stays in memory.
        assert len(list(swap_files())) == 2 * size
        stats = pool.stats()
        ranges = pool.spec.num_ranges
        assert stats.bytes_swapped_out == (3 + 1) * ranges * stats.block_bytes
        assert store.stats().bytes_swapped == stats.bytes_swapped_out
        assert (stats.sequences_swapped, stats.blocks_swapped) == (2, 3 * ranges)
        assert stats.blocks_free == before.blocks_free + 4 * ranges
        check_equal(pool)

        # Other sequences use the freed memory.
        fresh, cache = pool.acquire(cache, 200)
        cache = write(pool, cache, fresh, range(200))
        with pytest.raises(kvp.KVPageError, match=r"is on disk: pool.prefetch\(swapped\)"):
            pool.swap_in(cache, one)
        ticket = pool.prefetch(one)
        assert ticket.wait(60)
        assert (ticket.tokens, ticket.error) == (70, None)
        slot, cache = pool.swap_in(cache, one)
        fork, cache = pool.swap_in(cache, two, wait=True)
        check_written(cache, slot, ids)
        check_written(cache, fork, [*other, 7, 8])
        check_written(cache, kept, other)
        check_written(cache, fresh, range(200))
        assert pool.committed(fork) == [*other, 7, 8]
        assert (one.closed, two.closed) == (True, True)
        with pytest.raises(kvp.KVPageError, match="swapped in or dropped"):
            pool.swap_in(cache, one)
        pool.extend([slot, fork], 120)
        cache = write(pool, cache, slot, [1, 2, 3])
        cache = write(pool, cache, fork, [4])
        check_written(cache, slot, [*ids, 1, 2, 3])
        check_written(cache, fork, [*other, 7, 8, 4])
        check_equal(pool)
        nothing_left(pool, store)

        # Discarded, explicitly and by garbage collection.
        dropped, cache = pool.swap_out(cache, slot)
        lost, cache = pool.swap_out(cache, fresh)
        on_disk(store, dropped, lost)
        pool.drop_swapped(dropped)
        assert dropped.closed
        del lost
        gc.collect()
        nothing_left(pool, store)
        check_equal(pool)
        pool.check(pool.release(cache, [fork, kept]))
        assert pool.stats().swapped_out == 4
        assert pool.stats().swapped_in == 2


class _Swapping(Churn):
    """Requests that are also swapped out for a while."""

    verbs = (*Churn.verbs, "out", "out", "back", "back", "fetch", "give_up", "again")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.away: list[tuple[kvp.Swapped, list[int]]] = []

    def out(self, slot: int, ids: list[int]) -> None:
        del ids
        swapped, self.cache = self.pool.swap_out(self.cache, slot)
        self.away.append((swapped, self.live.pop(slot)))

    def _some(self) -> int | None:
        return int(self._rng.integers(len(self.away))) if self.away else None

    def back(self, slot: int, ids: list[int]) -> None:
        del slot, ids
        if (index := self._some()) is None:
            return
        swapped, held = self.away[index]
        slot, self.cache = self.pool.swap_in(self.cache, swapped, wait=True)
        del self.away[index]
        self.live[slot] = held

    def fetch(self, slot: int, ids: list[int]) -> None:
        del slot, ids
        if (index := self._some()) is not None:
            self.pool.prefetch(self.away[index][0])

    def give_up(self, slot: int, ids: list[int]) -> None:
        del slot, ids
        if (index := self._some()) is None:
            return
        swapped, _ = self.away.pop(index)
        if self._rng.integers(2):
            self.pool.drop_swapped(swapped)  # otherwise discarded by garbage collection

    def again(self, slot: int, ids: list[int]) -> None:
        del slot, ids
        if self._rng.integers(4) == 0:
            self.pool.check(self.cache)  # so that committed tokens are written
            self.cache = self.pool.cache()

    def end_all(self) -> None:
        super().end_all()
        self.live.clear()
        self.cache = self.pool.cache()
        while self.away:
            swapped, ids = self.away.pop()
            slot, self.cache = self.pool.swap_in(self.cache, swapped, wait=True)
            self._check(self.cache, slot, ids)
            self.cache = self.pool.release(self.cache, slot)
        self.pool.check(self.cache)
        self._audit(self.pool)


def _ran(requests: _Swapping, store: kvp.BlockStore, steps: int) -> None:
    requests.run(steps)
    requests.end_all()
    assert requests.pool.stats().swapped_in > steps // 20
    nothing_left(requests.pool, store)


def churn(size: int, path: str, steps: int) -> None:
    """Shards never disagree and tokens are kept, whatever the store's threads do meanwhile."""
    with (
        kvp.BlockStore(path) as store,
        pool_with(size, store, capacity=2 * 2**20, max_slots=8) as pool,
    ):
        requests = _Swapping(pool, size, write=write_each, check=check_written, audit=check_equal)
        _ran(requests, store, steps)


def _write_grown(
    pool: kvp.KVPool, cache: kvp.KVCache, sequences: Mapping[int, Sequence[int]]
) -> kvp.KVCache:
    return replica_rig.write(pool, cache, dict(sequences))


def on_replicas(replicas: int, parts: int, path: str, steps: int) -> None:
    """A sequence returns to the replica that it left, and needs that replica's memory."""
    spec = make_spec(4, max_slots=4 * replicas)
    size = replicas * 32 * 32 * spec.token_bytes
    axis = "tp" if parts > 1 else None
    mesh = replica_rig.make_mesh(replicas, parts)
    with (
        kvp.BlockStore(path) as store,
        kvp.KVPool(spec, size, mesh=mesh, axis=axis, data_axis="dp", store=store) as pool,
    ):
        slots, cache = pool.acquire(pool.cache(), [40] * replicas)
        tokens = {slot: list(range(100 * slot, 100 * slot + 40)) for slot in slots}
        cache = replica_rig.write(pool, cache, tokens)
        away = {}
        for slot in slots:
            away[slot], cache = pool.swap_out(cache, slot)
        on_disk(store, *away.values())
        assert len(list(swap_files())) == replicas * parts
        for slot in reversed(slots):
            new, cache = pool.swap_in(cache, away[slot], wait=True)
            assert pool.replica_of(new) == pool.replica_of(slot)
            check_written(cache, new, tokens[slot])
            assert pool.committed(new) == tokens[slot]
            cache = pool.release(cache, new)
        pool.check(cache)
        replica_rig.check_shards_equal(pool)
        nothing_left(pool, store)
        requests = _Swapping(
            pool,
            replicas,
            write=_write_grown,
            check=check_written,
            audit=replica_rig.check_shards_equal,
        )
        _ran(requests, store, steps)


def engine(size: int, path: str) -> None:
    """Requests that are preempted by swapping get the same tokens as on one device."""
    import serving_rig as rig

    from jax_kvpage.serving import CostAware, Engine, SamplingParams
    from jax_kvpage.serving.engine.swapping import PoolSwap

    rig.HEADS = rig.KV_HEADS = 4
    rig.DIM, rig.WIDTH = 32, 128
    spec = kvp.CacheSpec(
        rig.LAYERS, 4, 32, 8, 128, dtype=np.float32, layout="fused", block_tokens=rig.BLOCK
    )
    prompts = [rig.prompt(24, i) for i in range(6)]
    options = SamplingParams(temperature=0, max_tokens=90)
    with (
        kvp.KVPool(spec, "4MiB") as pool,
        Engine(rig.step, rig.params(), pool, rig.config()) as alone,
    ):
        wanted = rig.tokens(alone.generate(prompts, options))
    # For the rest of this process.
    pytest.MonkeyPatch().setattr(PoolSwap, "cost", lambda self, tokens: np.zeros_like(tokens))
    capacity = 14 * rig.BLOCK * spec.token_bytes
    for caching in (True, False):
        config = rig.config(preemption=CostAware(0), prefix_caching=caching)
        with (
            kvp.BlockStore(path) as store,
            kvp.KVPool(spec, capacity, mesh=make_mesh(size), axis="tp", store=store) as pool,
        ):
            params = jax.device_put(rig.params(), pool.placement)
            with Engine(rig.step, params, pool, config) as engine:
                engine.warm_up()
                outputs = engine.generate(prompts, options)
                assert rig.tokens(outputs) == wanted
                stats = pool.stats()
                assert engine.stats.swapped > 0
                assert stats.swapped_in == stats.swapped_out > 0
                assert sum(output.metrics.num_recomputed_tokens for output in outputs) == 0
            rig.check_empty(pool)  # waits for both devices
            check_equal(pool)
            nothing_left(pool, store)
