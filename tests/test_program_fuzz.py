"""Programs that pass arbitrary values to the pool: caches and batches with wrong handles, epochs,
lengths, slots, offsets and layers.

Each request stamps its tokens: all elements of its keys and values are its number, so a result
shows whose tokens were read and how many. The memory of every slot has belonged to another request
before, and the rest of it is NaN. An op may refuse or pass; in either case, no result shows
another's stamp or NaN, a refusal is one of this package's messages, and the pool continues from
its own record.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import num_cases, own_cases
from harness import RUN_TIME_ERRORS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pool_checks import check_totals

import jax_kvpage as kvp

_LAYERS, _DIM, _SLOTS, _MAX, _BLOCK = 2, 64, 5, 96, 16
_SEQUENCES, _TOKENS = 4, 12
_INT32 = 2**31
_WILD = st.one_of(
    st.integers(-2, _SLOTS + 1),
    st.integers(0, _MAX + 20),
    st.sampled_from([-_INT32, 1 - _INT32, 2**30, _INT32 - 2, _INT32 - 1]),
)

_Ints = NDArray[np.int32]


@dataclasses.dataclass
class Told:
    """The values that a program passes to the pool."""

    handle: _Ints
    epoch: NDArray[np.uint32]
    lengths: _Ints
    slots: _Ints
    offsets: _Ints
    layer: np.int32
    numbers: _Ints  # for set_lengths and map_slots, one per slot

    def cache(self, spec: kvp.CacheSpec) -> kvp.KVCache:
        arrays = map(jnp.asarray, (self.handle, self.epoch, self.lengths))
        return kvp.KVCache(*arrays, spec=spec)

    def batch(self) -> kvp.Batch:
        return kvp.Batch(jnp.asarray(self.slots), jnp.asarray(self.offsets))


def _stamped(cache: kvp.KVCache, batch: kvp.Batch, stamps: jax.Array) -> jax.Array:
    """Returns keys (or values) in which each token has the stamp of its slot."""
    tokens = jnp.arange(_TOKENS)
    sequence = jnp.searchsorted(batch.query_offsets[1:], tokens, side="right")
    slots = jnp.clip(batch.slots[jnp.clip(sequence, 0, _SEQUENCES - 1)], 0, _SLOTS - 1)
    return jnp.broadcast_to(stamps[slots][:, None, None], (_TOKENS, 1, _DIM))


_ONES = np.ones((_TOKENS, 1, _DIM), np.float32)
_OPTIONS: dict[str, Any] = {"scale": 1 / _DIM, "return_lse": True}


@jax.jit
def _append(cache: kvp.KVCache, told: Any) -> tuple[Any, ...]:
    batch, layer, _, stamps = told
    x = _stamped(cache, batch, stamps)
    return (kvp.append_kv(cache, x, x, batch, layer=layer),)


def _attend(cache: kvp.KVCache, told: Any, **static: str) -> tuple[Any, ...]:
    batch, layer, _, _ = told
    return kvp.paged_attention(_ONES, cache, batch, layer=layer, **static, **_OPTIONS)


@functools.partial(jax.jit, static_argnames="addressing")
def _update(cache: kvp.KVCache, told: Any, addressing: str = "slots") -> tuple[Any, ...]:
    batch, layer, _, stamps = told
    x = _stamped(cache, batch, stamps)
    return kvp.update_and_attend(
        _ONES, x, x, cache, batch, layer=layer, addressing=addressing, **_OPTIONS
    )


@jax.jit
def _read_new(cache: kvp.KVCache, told: Any, views: Any) -> tuple[Any, ...]:
    """Appends, then reads the complete views."""
    (cache,) = _append(cache, told)
    return tuple(kvp.read_views(cache, lambda *views: [x + 0 for x in views], *views))


@jax.jit
def _step(cache: kvp.KVCache, told: Any) -> tuple[Any, ...]:
    outs = []
    for layer in range(_LAYERS):
        *out, cache = _update(cache, (told[0], layer, *told[2:]))
        outs.append(out)
    return outs, kvp.advance(cache, told[0])


_OPS: dict[str, Callable[..., Any]] = {
    "append_kv": _append,
    "paged_attention": jax.jit(_attend),
    "read_kv / paged_attention (xla)": jax.jit(functools.partial(_attend, implementation="xla")),
    "update_and_attend": _update,
    "advance": jax.jit(lambda cache, told: (kvp.advance(cache, told[0]),)),
    "set_lengths": jax.jit(lambda c, told: (kvp.set_lengths(c, told[0].slots, told[2]),)),
    "map_slots": jax.jit(lambda cache, told: kvp.map_slots(cache, told[0].slots, told[2])),
    "positions": jax.jit(lambda cache, told: kvp.positions(cache, told[0], num_tokens=_TOKENS)),
}
_BY_TABLE: dict[str, Callable[..., Any]] = {
    "paged_attention": jax.jit(functools.partial(_attend, addressing="table")),
    "update_and_attend": functools.partial(_update, addressing="table"),
}
_ATTENDS = ("paged_attention", "read_kv / paged_attention (xla)", "update_and_attend")
_NAMES = "|".join([*map(re.escape, _OPS), "read_views"])
_REFUSAL = re.compile(f"(INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE): ({_NAMES}): ")


class World:
    """A pool with three active requests, in memory that earlier requests have used."""

    def __init__(self, layout: str, with_views: bool, debug: bool) -> None:
        spec = kvp.CacheSpec(
            _LAYERS, 1, _DIM, _SLOTS, _MAX, dtype=jnp.float32, layout=layout, block_tokens=_BLOCK
        )
        self.neighbour = kvp.KVPool(spec, "1MiB")
        gone = kvp.KVPool(spec, "1MiB")
        gone.close()
        blocks = 22 if layout == "fused" else 22 * 2 * _LAYERS  # less than all slots can hold
        size = blocks * spec.resolve("cpu").block_bytes
        self.pool = kvp.KVPool(spec, size, poison=True, debug=debug)
        self.spec = self.pool.spec
        self.ids = [p._pool.id for p in (self.pool, self.neighbour, gone)]
        self.stamps = np.zeros(_SLOTS, np.float32)  # 0 if the slot is free
        self.last = 0
        cache = self.pool.cache()
        slots, cache = self.pool.acquire(cache, [60] * _SLOTS)
        self._renamed(slots)
        for _ in range(5):
            cache = self._write(cache, slots[:_SEQUENCES], 3)
            cache = self._write(cache, slots[_SEQUENCES:], 12)
        self.pool.release(cache, slots)
        jax.block_until_ready(cache)
        self.stamps[:] = 0
        self.views = self.pool.view(0) if with_views else None
        slots, cache = self.pool.acquire(self.pool.cache(), [40, 20, 0])
        self._renamed(slots)
        self._write(cache, slots[:2], 6)

    def close(self) -> None:
        self.views = None
        self.pool.close()
        self.neighbour.close()

    def _renamed(self, slots: list[int]) -> None:
        for slot in slots:
            self.last = self.last % 1000 + 1
            self.stamps[slot] = self.last

    def _told(self, batch: kvp.Batch, layer: int, numbers: _Ints) -> Any:
        return batch, layer, jnp.asarray(numbers), jnp.asarray(self.stamps)

    def _write(self, cache: kvp.KVCache, slots: list[int], count: int) -> kvp.KVCache:
        """Runs a valid step and checks its results."""
        counts = [count] * len(slots) + [0] * (_SEQUENCES - len(slots))
        named = np.asarray([*slots, *[-1] * (_SEQUENCES - len(slots))], np.int32)
        offsets = np.cumsum([0, *counts], dtype=np.int32)
        lengths = np.asarray(cache.lengths)
        told = self._told(kvp.Batch(named, offsets), 0, named)
        layers, cache = _step(cache, told)
        for out, lse in layers:
            self._check_attention(out, lse, named, offsets, lengths)
        return cache

    def _check_attention(
        self, out: Any, lse: Any, slots: _Ints, offsets: _Ints, lengths: _Ints
    ) -> None:
        """Asserts that everything attended to has the sequence's stamp and the number of tokens
        that the cache says, and that rows without a sequence are empty.
        """
        out, lse = np.asarray(out)[:, 0], np.asarray(lse)[:, 0]
        stamps, sums = np.zeros(_TOKENS), np.full(_TOKENS, -np.inf)
        for s, slot in enumerate(slots):
            for i, token in enumerate(range(offsets[s], offsets[s + 1])):
                if slot >= 0:
                    assert self.stamps[slot] > 0, f"slot {slot} is nobody's"
                    stamps[token] = self.stamps[slot]
                    sums[token] = stamps[token] + math.log(lengths[slot] + i + 1)
        np.testing.assert_allclose(out, np.repeat(stamps[:, None], _DIM, 1), rtol=1e-5)
        np.testing.assert_allclose(lse, sums, rtol=1e-5)

    def append(self, cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
        """Writes the new tokens of a valid batch in every layer."""
        occupied, lengths = np.flatnonzero(self.stamps), np.asarray(cache.lengths)
        self.pool.extend(occupied.tolist(), [int(lengths[slot]) + 3 for slot in occupied])
        for layer in range(_LAYERS):
            (cache,) = _append(cache, self._told(batch, layer, np.asarray(batch.slots)))
        return cache

    def renew(self, slot: int) -> None:
        """Gives the slot a new occupant, or makes it free."""
        cache = self.pool.cache()
        if self.stamps[slot] > 0:
            cache = self.pool.release(cache, slot)
            jax.block_until_ready(cache)
            self.stamps[slot] = 0
        if np.count_nonzero(self.stamps) < 3:
            found, _ = self.pool.acquire(cache, 20)
            self._renamed([found])

    def run(self, op: str, told: Told, by_table: bool) -> bool:
        """Runs an op, checks its results, and returns whether it passed. `by_table`: use table
        addressing if the op has it.
        """
        before = check_totals(self.neighbour)
        cache, batch = told.cache(self.spec), told.batch()
        arguments: tuple[Any, ...] = (self._told(batch, told.layer, told.numbers),)
        function = _OPS.get(op, _read_new)
        if by_table:
            function = _BY_TABLE.get(op, function)
        if function is _read_new:
            arguments += (self.views,)
        try:
            results = jax.block_until_ready(function(cache, *arguments))
        except RUN_TIME_ERRORS as error:
            text = str(error)
            assert _REFUSAL.search(text), text
            assert "INTERNAL" not in text.replace("INTERNAL: Error dispatching", ""), text
            assert len(text) < 1000, text
            assert not re.search(r"\n|0x|Traceback|\.cc\b", text.strip()), text
            return False
        finally:
            assert check_totals(self.neighbour) == before
        if op in _ATTENDS:
            self._check_attention(*results[:2], told.slots, told.offsets, told.lengths)
        if function is _read_new:
            for view in results:
                for slot in np.flatnonzero(self.stamps):
                    seen = np.asarray(view)[slot]
                    assert np.isin(seen, [0, self.stamps[slot]]).all(), f"slot {slot}"
        return True

    def verify(self) -> None:
        """Asserts that the pool's record is sound, and that its requests can continue."""
        stats = check_totals(self.pool)
        occupied = np.flatnonzero(self.stamps)
        assert (stats.slots_occupied, stats.slots_draining) == (len(occupied), 0)
        assert [row.slot for row in self.pool.slot_table()] == occupied.tolist()
        cache = self.pool.cache()
        lengths = np.asarray(cache.lengths)
        assert np.array_equal(lengths >= 0, self.stamps > 0), lengths
        for slot in occupied[lengths[occupied] >= _MAX - _SEQUENCES]:
            cache = kvp.set_lengths(cache, np.asarray([slot], np.int32), np.asarray([7], np.int32))
        self.pool.extend(occupied.tolist(), [max(int(lengths[s]) + 2, 20) for s in occupied])
        self._write(cache, occupied.tolist(), 2)


@st.composite
def _lies(draw: st.DrawFn, world: World) -> Told:
    """Draws the values that a program passes; sometimes all of them are correct."""
    cache = world.pool.cache()
    count = draw(st.integers(0, 3))
    slots = draw(st.permutations(range(_SLOTS)))[:_SEQUENCES]
    told = Told(
        *(np.array(x) for x in (cache.handle, cache.epoch, cache.lengths)),
        slots=np.array([s if world.stamps[s] > 0 else -1 for s in slots], np.int32),
        offsets=np.arange(_SEQUENCES + 1, dtype=np.int32) * count,
        layer=np.int32(draw(st.integers(0, _LAYERS - 1))),
        numbers=np.array(draw(st.lists(_WILD, min_size=4, max_size=4)), np.int32),
    )
    if draw(st.booleans()):  # write the new tokens, as readers require
        told.epoch = np.array(world.append(cache, told.batch()).epoch)
    kinds = ("handle", "generation", "epoch", "lengths", "length", "slots", "offsets", "layer")
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=2)):
        if kind == "handle":
            told.handle[0] = draw(st.one_of(st.sampled_from(world.ids), _WILD))
        elif kind == "generation":
            told.handle[1] = draw(st.one_of(st.just(told.handle[1] - 1), _WILD))
        elif kind == "epoch":
            near = st.integers(-3, 3).map(lambda n: (int(told.epoch[0]) + n) % 2**32)
            told.epoch[0] = draw(st.one_of(near, st.integers(0, 2**32 - 1)))
        elif kind == "lengths":
            told.lengths[:] = draw(st.lists(_WILD, min_size=_SLOTS, max_size=_SLOTS))
        elif kind == "length":  # change one by a little
            slot, more = draw(st.integers(0, _SLOTS - 1)), draw(st.integers(-3, 3))
            told.lengths[slot] = np.clip(int(told.lengths[slot]) + more, -_INT32, _INT32 - 1)
        elif kind == "slots":
            told.slots[draw(st.integers(0, _SEQUENCES - 1))] = draw(_WILD)
        elif kind == "offsets":
            told.offsets[draw(st.integers(0, _SEQUENCES))] = draw(_WILD)
        else:
            told.layer = np.int32(draw(_WILD))
    return told


@pytest.mark.parametrize("kind", ["fused", "per_layer", "per_layer, views", "fused, debug"])
def test_nothing_that_a_program_tells_is_believed(kind: str) -> None:
    layout, _, more = kind.partition(", ")
    ops = [*_OPS, "read_views"] if more == "views" else [*_OPS]
    passed, refused = dict.fromkeys(ops, 0), dict.fromkeys(ops, 0)

    @own_cases(kind)
    # No shrinking: it takes minutes, and failures need most of a pool's history.
    @settings(max_examples=num_cases(40, exhaustive=120), phases=[Phase.generate])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        world = World(layout, more == "views", more == "debug")
        try:
            for op in data.draw(st.permutations(ops)):
                if data.draw(st.integers(0, 2)) == 0:
                    world.renew(data.draw(st.integers(0, _SLOTS - 1)))
                told, by_table = data.draw(_lies(world)), data.draw(st.booleans())
                counts = passed if world.run(op, told, by_table) else refused
                counts[op] += 1
                world.verify()
        finally:
            world.close()

    check()
    # If a program was always refused or always passed, the test would show little. positions cannot
    # be refused.
    assert all(passed.values()), passed
    assert all(refused[op] for op in ops if op != "positions"), refused
