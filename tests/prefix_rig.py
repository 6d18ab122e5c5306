"""A rig whose sequences are acquired by their tokens, with a model of their contents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from reference_numpy import rounded

import jax_kvpage as kvp
from jax_kvpage import events

LAYERS, HEADS, DIM, BLOCK = 2, 2, 64, 16
_STEP = 64  # tokens that one program writes

_append = jax.jit(
    lambda cache, k, v, batch: kvp.advance(
        functools.reduce(
            lambda c, layer: kvp.append_kv(c, k[layer], v[layer], batch, layer=layer),
            range(LAYERS),
            cache,
        ),
        batch,
    )
)
_read = jax.jit(
    lambda cache, slots: jnp.stack([
        jnp.stack(kvp.read_kv(cache, slots, layer)) for layer in range(LAYERS)
    ])
)  # fmt: skip


@jax.jit
def _read_values(cache: kvp.KVCache, batch: kvp.Batch, begin: jax.Array) -> jax.Array:
    """Returns the values [layers, tokens, heads, head_dim] of a sequence from `begin` on: with a
    window of one token, attention returns that token's value.
    """
    lengths = cache.lengths.at[batch.slots[0]].set(begin)
    before = dataclasses.replace(cache, lengths=lengths)
    q = jnp.ones((cache.spec.max_seq_len, HEADS, DIM), jnp.float32)
    return jnp.stack([
        kvp.paged_attention(q, before, batch, layer=layer, sliding_window=1)
        for layer in range(LAYERS)
    ])  # fmt: skip


def spec_of(layout: str, dtype: object = jnp.float32, **changes: object) -> kvp.CacheSpec:
    fields = {"max_slots": 8, "max_seq_len": 512, "layout": layout, "block_tokens": BLOCK}
    return kvp.CacheSpec(LAYERS, HEADS, DIM, dtype=dtype, **{**fields, **changes})


@functools.cache
def _token_rows(token: int, position: int) -> NDArray[np.float32]:
    """Returns a token's keys and values [2, layers, heads, head_dim], determined by id and
    position.
    """
    rng = np.random.default_rng((token & 0xFFFFFFFF, position))
    return rng.standard_normal((2, LAYERS, HEADS, DIM), np.float32)


class Replay:
    """A copy of a pool's index, kept up to date by its events.

    Attributes:
        blocks: Namespace, parent hash and tokens of each block.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[str | None, int | None, tuple[int, ...]]] = {}

    def read(self, batch: Sequence[events.Event]) -> None:
        for event in batch:
            if isinstance(event, events.AllBlocksCleared):
                self.blocks.clear()
            elif isinstance(event, events.BlockRemoved):
                for name in event.block_hashes:
                    del self.blocks[name]
            else:
                size, parent = event.block_size, event.parent_block_hash
                assert len(event.token_ids) == size * len(event.block_hashes)
                assert parent is None or parent in self.blocks
                for i, name in enumerate(event.block_hashes):
                    assert name not in self.blocks
                    ids = event.token_ids[i * size : (i + 1) * size]
                    self.blocks[name] = (event.namespace, parent, ids)
                    parent = name

    def sequences(self) -> set[tuple[str | None, tuple[int, ...]]]:
        """Returns, for each block, its namespace and all tokens up to its end."""
        found = set()
        for space, parent, ids in self.blocks.values():
            while parent is not None:
                owner, parent, before = self.blocks[parent]
                assert owner == space
                ids = before + ids
            found.add((space, ids))
        return found


def contents(ids: Sequence[int], begin: int = 0) -> NDArray[np.float32]:
    """Returns keys and values of the tokens from `begin` on: [2, layers, tokens, heads,
    head_dim].
    """
    rows = [_token_rows(int(ids[i]), i) for i in range(begin, len(ids))]
    empty = np.zeros((2, LAYERS, 0, HEADS, DIM), np.float32)
    return np.stack(rows, axis=2) if rows else empty


def text(n: int, seed: int = 0) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(0, 32000, n)]


class PrefixRig:
    """A pool and its newest cache.

    Attributes:
        ids: Written tokens of each live slot.
        dropped: Number of dropped tokens of slots that have dropped any.
    """

    def __init__(self, pool: kvp.KVPool) -> None:
        self.pool = pool
        self.cache = pool.cache()
        self.ids: dict[int, list[int]] = {}
        self.dropped: dict[int, int] = {}

    def drop(self, slot: int, tokens: int) -> None:
        """Drops full blocks of tokens."""
        self.cache = self.pool.drop_before(self.cache, slot, tokens)
        whole = max(tokens - tokens % BLOCK, self.dropped.get(slot, 0))
        if whole:
            self.dropped[slot] = whole

    def acquire(self, ids: Sequence[int], **options: object) -> tuple[int, int]:
        """Acquires a slot and writes and commits all its tokens; also returns how many were
        found.
        """
        ids = [int(token) for token in ids]
        slot, cached, self.cache = self.pool.acquire_prefix(self.cache, ids, **options)
        self.ids[slot] = ids[:cached]
        self.write(slot, ids[cached:])
        return slot, cached

    def write(self, slot: int, ids: Sequence[int], commit: bool = True) -> None:
        """Appends tokens to a sequence."""
        ids = list(ids)
        self.pool.extend(slot, len(self.ids[slot]) + len(ids))
        for begin in range(0, len(ids), _STEP):
            part = ids[begin : begin + _STEP]
            rows = np.zeros((2, LAYERS, _STEP, HEADS, DIM), np.float32)
            old = self.ids[slot]
            rows[:, :, : len(part)] = contents([*old, *part], len(old))
            batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, len(part)]))
            k, v = (jnp.asarray(x, self.input_dtype) for x in rows)
            self.cache = _append(self.cache, k, v, batch)
            self.ids[slot] = old + part
        if commit and ids:
            self.pool.commit(slot, ids)

    @property
    def input_dtype(self) -> object:
        dtype = np.dtype(self.pool.spec.dtype)
        return jnp.float32 if dtype.itemsize == 1 else dtype

    def release(self, *slots: int) -> None:
        """Releases sequences and waits until they have drained."""
        self.cache = self.pool.release(self.cache, list(slots))
        for slot in slots:
            del self.ids[slot]
            self.dropped.pop(slot, None)
        self.pool.check(self.cache)

    def check(self) -> None:
        """Asserts that every live sequence holds the tokens written to it, rounded to the stored
        dtype.
        """
        for slot, ids in self.ids.items():
            lengths = np.asarray(self.cache.lengths)
            assert lengths[slot] == len(ids), f"slot {slot}: {lengths[slot]} != {len(ids)}"
            want = rounded(contents(ids), self.pool.spec.dtype)
            if begin := self.dropped.get(slot):
                batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, len(ids) - begin]))
                got = np.asarray(_read_values(self.cache, batch, begin))[:, : len(ids) - begin]
                np.testing.assert_allclose(got, want[1, :, begin:], rtol=1e-5)
                continue
            got = np.asarray(_read(self.cache, jnp.asarray([slot])), np.float32)
            # Scales are applied in float32.
            got = got[:, :, 0, : len(ids)].swapaxes(0, 1)
            np.testing.assert_allclose(got, want, rtol=3e-7, atol=0)
