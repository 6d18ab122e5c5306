"""Decode attention of sequences that share a prefix: each result has the same bits as for the
sequence alone, whichever sequences are processed together.

`cc/tests/grouped_decode_test.cc` checks that the kernels do process prefixes of this size together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import append_all, input_dtype, make_batch

import jax_kvpage as kvp

_KV_HEADS, _DIM, _BLOCK = 8, 128, 16
# Prefixes are grouped from 4 MiB of keys and values: 512 tokens in float32, 1024 in 16 bits, 2048
# in 8.
_SHARED = {"float32": 1040, "bfloat16": 1040, "float16": 1040, "int8": 2064, "float8_e4m3fn": 2064}


@functools.partial(jax.jit, static_argnames=("window", "addressing"))
def _attend(
    cache: kvp.KVCache,
    q: jax.Array,
    batch: kvp.Batch,
    window: int | None,
    addressing: str = "slots",
) -> jax.Array:
    return kvp.paged_attention(
        q, cache, batch, layer=1, sliding_window=window, addressing=addressing
    )


class _Sequences:
    """A pool, its newest cache, and the lengths of its sequences."""

    def __init__(self, make_pool, layout: str, dtype: str) -> None:
        spec = kvp.CacheSpec(
            2, _KV_HEADS, _DIM, 12, 4096, dtype=dtype, layout=layout, block_tokens=_BLOCK
        ).resolve("cpu")
        self.pool = make_pool(spec, 450 * spec.num_ranges * spec.block_bytes)
        self.dtype = input_dtype(spec)
        self.cache = self.pool.cache()
        self.rng = np.random.default_rng(0)
        self.lengths: dict[int, int] = {}

    def random(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal((*shape, _DIM), np.float32), self.dtype)

    def append(self, tokens: dict[int, int]) -> None:
        """Appends and commits new tokens, all in one batch."""
        for slot, n in tokens.items():
            self.lengths[slot] += n
            self.pool.extend(slot, self.lengths[slot])
        total = sum(tokens.values())
        k, v = (self.random(2, total, _KV_HEADS) for _ in range(2))
        self.cache = append_all(self.cache, k, v, make_batch(list(tokens.items())))
        for slot, n in tokens.items():
            self.pool.commit(slot, range(n))

    def acquire(self, tokens: int) -> int:
        slot, self.cache = self.pool.acquire(self.cache, tokens)
        self.lengths[slot] = 0
        self.append({slot: tokens})
        return slot

    def fork(self, donor: int, n: int) -> list[int]:
        slots, self.cache = self.pool.fork(self.cache, donor, n)
        self.lengths.update(dict.fromkeys(slots, self.lengths[donor]))
        return slots

    def check(
        self, tokens: dict[int, int], window: int | None = None, addressing: str = "slots"
    ) -> None:
        """Compares attention over the sequences' last tokens, computed together and one by one."""
        lengths = np.asarray(self.cache.lengths).copy()
        for slot, n in tokens.items():
            assert lengths[slot] == self.lengths[slot]
            lengths[slot] -= n
        before = kvp.KVCache(
            handle=self.cache.handle,
            epoch=self.cache.epoch,
            lengths=jnp.asarray(lengths),
            spec=self.cache.spec,
        )
        q = self.random(sum(tokens.values()), 2 * _KV_HEADS)
        together = _attend(before, q, make_batch(list(tokens.items())), window, addressing)
        begin = 0
        for slot, n in tokens.items():
            alone = _attend(before, q[begin : begin + n], make_batch([(slot, n)]), window)
            np.testing.assert_array_equal(
                np.asarray(together[begin : begin + n], np.float32), np.asarray(alone, np.float32)
            )
            begin += n


@pytest.mark.parametrize("dtype", list(_SHARED))
def test_a_batch_of_two_families_and_others(make_pool, layout: str, dtype: str) -> None:
    """Ragged tails, two tokens at once, a prefill and unrelated sequences; with a window too."""
    s = _Sequences(make_pool, layout, dtype)
    first, second = s.acquire(_SHARED[dtype]), s.acquire(_SHARED[dtype] + 7)
    a, b = s.fork(first, 3), s.fork(second, 1)
    others = [s.acquire(40), s.acquire(600)]
    s.append({first: 3, a[0]: 1, a[1]: 30, second: 9, b[0]: 2})
    batch = {a[0]: 1, second: 1, others[0]: 1, first: 2, b[0]: 1, a[1]: 30, others[1]: 1, a[2]: 1}
    s.check(batch)
    s.check(batch, window=_SHARED[dtype] - 100)


@pytest.mark.parametrize("addressing", ["slots", "table"])
def test_prefixes_of_prefixes(make_pool, layout: str, addressing: str) -> None:
    s = _Sequences(make_pool, layout, "float32")
    root = s.acquire(530)
    branches = s.fork(root, 2)
    s.append({branches[0]: 530, branches[1]: 5})
    leaves = s.fork(branches[0], 2)
    s.append({leaves[0]: 3, leaves[1]: 20})
    s.check(dict.fromkeys([root, *branches, *leaves], 1), addressing=addressing)


def test_after_truncate_reorder_and_release(make_pool, layout: str) -> None:
    """Shared blocks are replaced, freed, and reused by other sequences."""
    s = _Sequences(make_pool, layout, "float32")
    slots = [s.acquire(1040)]
    slots += s.fork(slots[0], 3)
    s.append({slot: 2 + i for i, slot in enumerate(slots)})
    s.check(dict.fromkeys(slots, 1))

    s.cache = s.pool.truncate(s.cache, slots[0], 200)  # the donor, within the first shared span
    s.lengths[slots[0]] = 200
    s.append({slots[0]: 900})
    s.check(dict.fromkeys(slots, 1))

    new, s.cache = s.pool.reorder(s.cache, slots, [0, 0, 1, 1])
    s.lengths = {slot: s.lengths[slots[p]] for slot, p in zip(new, [0, 0, 1, 1], strict=True)}
    s.append({slot: 1 + i for i, slot in enumerate(new)})
    s.check(dict.fromkeys(new, 1))

    s.cache = s.pool.release(s.cache, [new[0], new[2]])
    fresh = [s.acquire(1100), s.acquire(1100)]  # reuse the freed slots and blocks
    s.check(dict.fromkeys([*fresh, new[1], new[3]], 1))
    more = s.fork(fresh[0], 1)
    s.check(dict.fromkeys([*fresh, new[1], new[3], *more], 1))


def test_hits_of_the_prefix_cache(make_pool, layout: str) -> None:
    """Blocks from a live sequence, from a parked one, and from the index alone."""
    s = _Sequences(make_pool, layout, "float32")
    ids = list(range(1050))

    def acquire(own: int) -> int:
        slot, cached, s.cache = s.pool.acquire_prefix(s.cache, [*ids, own], num_tokens=1100)
        s.lengths[slot] = cached
        rest = [*ids, own][cached:]
        k, v = (s.random(2, len(rest), _KV_HEADS) for _ in range(2))
        s.cache = append_all(s.cache, k, v, make_batch([(slot, len(rest))]))
        s.lengths[slot] += len(rest)
        s.pool.commit(slot, rest)
        return slot

    first, second, third = (acquire(own) for own in (1, 2, 3))
    assert s.pool.stats().blocks_shared >= 1040 // _BLOCK
    s.check(dict.fromkeys([first, second, third], 1))
    s.cache = s.pool.release(s.cache, [first, second])
    jax.block_until_ready(s.cache)
    more = [acquire(own) for own in (1, 4, 5)]
    s.check(dict.fromkeys([*more, third], 1))


def test_block_tables_that_name_the_same_pages() -> None:
    rng = np.random.default_rng(1)
    k, v = (
        jnp.asarray(rng.standard_normal((90, 16, _KV_HEADS, _DIM), np.float32)) for _ in range(2)
    )
    shared, lengths = 64, np.asarray([1030, 1100, 1025, 400], np.int32)
    tables = np.zeros((4, 70), np.int32)
    tables[:3, :shared] = rng.permutation(64)
    tables[0, shared:66], tables[1, shared:], tables[2, shared] = [64, 65], range(66, 72), 72
    tables[3, :17], tables[3, 17:25] = range(73, 90), range(8)
    q = jnp.asarray(rng.standard_normal((4, 2 * _KV_HEADS, _DIM), np.float32))

    def attend(rows: list[int]) -> jax.Array:
        return kvp.paged_attention_with_tables(
            q[np.asarray(rows)], k, v, jnp.asarray(tables[rows]), jnp.asarray(lengths[rows])
        )

    together = attend([0, 1, 2, 3])
    for row in range(4):
        np.testing.assert_array_equal(np.asarray(together[row]), np.asarray(attend([row])[0]))
