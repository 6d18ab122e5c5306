"""Errors raised before a program runs: all mistakes in shapes, dtypes and options are reported at
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_values import BATCH, LAYERS, abstract_cache, make_kv, make_q

import jax_kvpage as kvp

_RANGE = "that float32 can hold (1.2e-38 to 2.4e+38)"


def _mistakes(call: Callable[[], Any]) -> list[str]:
    """The lines of the ValueError, without its heading."""
    with pytest.raises(ValueError) as caught:
        call()
    _, *mistakes = str(caught.value).split("\n  - ")
    return mistakes


def test_every_mistake_at_once() -> None:
    batch = kvp.Batch([0, 1], [0, 1], num_tokens=9)
    mistakes = _mistakes(
        lambda: kvp.update_and_attend(
            make_q(6, heads=3),
            make_kv(5),
            make_kv(6, dim=16, dtype=jnp.int8),
            abstract_cache(epoch=jnp.zeros(1, jnp.int32)),
            batch,
            layer=LAYERS,
            scale=-1.0,
            sliding_window=0,
            logits_soft_cap=float("inf"),
            sinks=jnp.zeros(3, jnp.int32),
            alibi_slopes=jnp.zeros(5),
            implementation="tpu",
        )
    )
    floats = "wanted float32 or bfloat16 or float16 [T=6, Hkv=2, D=32], got"
    for part in (
        "cache.epoch: wanted uint32 [1], got int32[1]",
        "batch.query_offsets: wanted int32 [S+1=3], got int32[2]",
        "q: has 6 tokens, but batch.num_tokens is 9",
        "q: wanted a multiple of the 2 key/value heads as heads, got 3",
        f"k: {floats} float32[5, 2, 32]",
        f"v: {floats} int8[6, 2, 16]",
        "v: wanted the dtype of k, float32, got int8",
        "layer: wanted 0 to 2, the spec has 3, got 3",
        f"scale: wanted a positive number {_RANGE} or None, got -1.0",
        "sliding_window: wanted None, an int from 1",
        f"logits_soft_cap: wanted a positive number {_RANGE} or None, got inf",
        "sinks: wanted floating point values, got int32[3]",
        "alibi_slopes: wanted float32 [Hq=3], got float32[5]",
        "implementation: wanted 'cpu', 'cuda', 'xla' or None, got 'tpu'",
    ):
        assert any(mistake.startswith(part) for mistake in mistakes), (part, mistakes)
    assert len(mistakes) == 14


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "append: rank of k": (
            lambda: kvp.append_kv(abstract_cache(), make_kv()[0], make_kv(), BATCH, layer=0),
            r"append_kv:\n  - k: wanted .*\[T, Hkv=2, D=32\], got float32\[2, 32\]",
        ),
        "append: tokens of v": (
            lambda: kvp.append_kv(abstract_cache(), make_kv(), make_kv(3), BATCH, layer=0),
            r"v: wanted .*\[T=2, Hkv=2, D=32\], got float32\[3, 2, 32\]",
        ),
        "append: negative layer": (
            lambda: kvp.append_kv(abstract_cache(), make_kv(), make_kv(), BATCH, layer=-1),
            "layer: wanted 0 to 2, the spec has 3, got -1",
        ),
        "append: layer of the wrong type": (
            lambda: kvp.append_kv(abstract_cache(), make_kv(), make_kv(), BATCH, layer=1.0),
            r"layer: wanted int32 \[\], got float32\[\]",
        ),
        "attend: head size": (
            lambda: kvp.paged_attention(make_q(dim=64), abstract_cache(), BATCH, layer=0),
            r"q: wanted .*\[T=2, Hq=4, D=32\], got float32\[2, 4, 64\]",
        ),
        "attend: float64-like queries": (
            lambda: kvp.paged_attention(make_q(dtype=jnp.int32), abstract_cache(), BATCH, layer=0),
            r"q: wanted float32 or bfloat16 or float16 .* got int32",
        ),
        "attend: empty sinks": (
            lambda: kvp.paged_attention(
                make_q(), abstract_cache(), BATCH, layer=0, sinks=jnp.zeros(0)
            ),
            "sinks: is empty; pass None",
        ),
        "attend: scale as an array": (
            lambda: kvp.paged_attention(
                make_q(), abstract_cache(), BATCH, layer=0, scale=jnp.ones(())
            ),
            r"scale: wanted a Python number known at trace time.*multiplied into q",
        ),
        "attend: window of floats": (
            lambda: kvp.paged_attention(
                make_q(), abstract_cache(), BATCH, layer=0, sliding_window=jnp.ones(())
            ),
            r"sliding_window: wanted int32 \[\], got float32\[\]",
        ),
        "slots of floats": (
            lambda: kvp.paged_attention(
                make_q(),
                abstract_cache(),
                kvp.Batch(jnp.zeros(2), jnp.zeros(3, jnp.int32)),
                layer=0,
            ),
            r"batch.slots: wanted int32 \[S=2\], got float32\[2\]",
        ),
        "another number of slots": (
            lambda: kvp.advance(abstract_cache(lengths=jnp.zeros(5, jnp.int32)), BATCH),
            r"advance:\n  - cache.lengths: wanted int32 \[max_slots=4\], got int32\[5\]",
        ),
        "map: one number each": (
            lambda: kvp.map_slots(abstract_cache(), [0, 1], [5, 6, 7]),
            r"map_slots:\n  - num_tokens: wanted int32 \[n=2\], got int32\[3\]",
        ),
        "map: whole numbers": (
            lambda: kvp.map_slots(abstract_cache(), [0.5], [5]),
            r"slots: wanted int32 \[n=1\], got float32\[1\]",
        ),
        "set: beyond int32": (
            lambda: kvp.set_lengths(abstract_cache(), [0], [2**40]),
            "set_lengths: lengths: wanted integers that fit int32, got 1099511627776",
        ),
        "after: epoch": (
            lambda: kvp.after(abstract_cache(epoch=jnp.zeros(2, jnp.uint32)), make_q()),
            r"after:\n  - cache.epoch: wanted uint32 \[1\], got uint32\[2\]",
        ),
        "mask: shape": (
            lambda: BATCH.mask(jnp.ones(3, bool)),
            r"Batch.mask: keep: wanted bool\[2\].* got bool\[3\]",
        ),
        "mask: dtype": (lambda: BATCH.mask(jnp.ones(2)), "Batch.mask: .*got float32"),
        "lengths that do not match": (
            lambda: kvp.Batch.from_lengths([0, 1], [3]),
            r"Batch.from_lengths:\n  - slots \(2,\) and lengths \(1,\) do not match",
        ),
        "lengths that are no integers": (
            lambda: kvp.Batch.from_lengths([0, 1], jnp.ones(2)),
            "lengths must be integers, got float32",
        ),
        "lengths below zero, and too many": (
            lambda: kvp.Batch.from_lengths([0, 1], [9, -1], num_tokens=7),
            r"lengths must not be negative, got -1\n  - lengths sum to 8, more than num_tokens=7",
        ),
        "tables: pages": (
            lambda: kvp.paged_attention_with_tables(
                make_q(),
                jnp.zeros((9, 16, 2, 64)),
                jnp.zeros((9, 16, 2, 32), jnp.bfloat16),
                jnp.zeros((2, 3), jnp.int32),
                jnp.zeros(3, jnp.int32),
            ),
            r"query_offsets: None means one token for each of the 3 sequences, but q has 2\n"
            r"  - v_pages: wanted .*page_size=16, Hkv=2, D=64\], got bfloat16\[9, 16, 2, 32\]\n"
            r"  - v_pages: wanted the dtype of k_pages, float32, got bfloat16\n"
            r"  - lengths: wanted int32 \[S=2\], got int32\[3\]\n(.|\n)*"
            r"  - q: wanted .*D=64\], got float32\[2, 4, 32\]",
        ),
        "tables: layout": (
            lambda: kvp.paged_attention_with_tables(
                make_q(),
                jnp.zeros((9, 16, 2, 32)),
                jnp.zeros((9, 16, 2, 32)),
                jnp.zeros((2, 3), jnp.int32),
                jnp.zeros(2, jnp.int32),
                kv_layout="DNH",
            ),
            "kv_layout: wanted 'NHD' or 'HND', got 'DNH'",
        ),
        "positions under jit": (
            lambda: jax.jit(kvp.positions)(abstract_cache(), kvp.Batch([0], [0, 5])),
            r"positions:\n  - num_tokens: .*num_tokens=q.shape\[0\].*Batch.from_lengths",
        ),
        "positions: disagreement": (
            lambda: kvp.positions(abstract_cache(), BATCH, num_tokens=3),
            "num_tokens: got 3, but batch.num_tokens is 2",
        ),
    }.values(),
)
def test_each_mistake(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("op", ["append", "attend", "advance", "map", "after"])
def test_not_a_cache_or_batch(op: str) -> None:
    calls = {
        "append": lambda: kvp.append_kv(abstract_cache(), make_kv(), make_kv(), (0, 1), layer=0),
        "attend": lambda: kvp.paged_attention(make_q(), make_kv(), BATCH, layer=0),
        "advance": lambda: kvp.advance(abstract_cache(), None),
        "map": lambda: kvp.map_slots(None, [0], [1]),
        "after": lambda: kvp.after(make_q(), make_q()),
    }
    with pytest.raises(ValueError, match=r"wanted a (KVCache|Batch)"):
        calls[op]()


@pytest.mark.parametrize(
    ("signature", "call"),
    [
        (
            "append_kv(cache, k, v, batch, *, layer)",
            lambda c, b, x: [
                lambda: kvp.append_kv(x, x, c, b, layer=0),
                lambda: kvp.append_kv(c, b, x, x, layer=0),
                lambda: kvp.append_kv(c, x, b, x, layer=0),
                lambda: kvp.append_kv(c, x, x, c, layer=0),
                lambda: kvp.append_kv(b, x, x, c, layer=0),
                lambda: kvp.append_kv(c, None, x, b, layer=0),
            ],
        ),
        (
            "paged_attention(q, cache, batch, *, layer)",
            lambda c, b, x: [
                lambda: kvp.paged_attention(c, x, b, layer=0),
                lambda: kvp.paged_attention(c, b, x, layer=0),
                lambda: kvp.paged_attention(x, b, c, layer=0),
                lambda: kvp.paged_attention("q", c, b, layer=0),
            ],
        ),
        (
            "update_and_attend(q, k, v, cache, batch, *, layer)",
            lambda c, b, x: [
                lambda: kvp.update_and_attend(c, x, x, x, b, layer=0),
                lambda: kvp.update_and_attend(x, c, x, x, b, layer=0),
                lambda: kvp.update_and_attend(x, x, b, c, x, layer=0),
                lambda: kvp.update_and_attend(x, x, x, b, c, layer=0),
                lambda: kvp.update_and_attend(x, x, [x], c, b, layer=0),
            ],
        ),
        ("advance(cache, batch)", lambda c, b, x: [lambda: kvp.advance(b, c)]),
        ("grow(cache, batch)", lambda c, b, x: [lambda: kvp.grow(b, c), lambda: kvp.grow(c, x)]),
        (
            "read_kv(cache, batch_or_slots, layer)",
            lambda c, b, x: [lambda: kvp.read_kv(b, c, 0), lambda: kvp.read_kv(c, c, 0)],
        ),
        ("positions(cache, batch)", lambda c, b, x: [lambda: kvp.positions(b, c)]),
        ("after(cache, value)", lambda c, b, x: [lambda: kvp.after(x, c)]),
        (
            "map_slots(cache, slots, num_tokens)",
            lambda c, b, x: [lambda: kvp.map_slots([0], c, 5)],
        ),
        (
            "set_lengths(cache, slots, lengths)",
            lambda c, b, x: [lambda: kvp.set_lengths([0], [5], c)],
        ),
        (
            "paged_attention_with_tables(q, k_pages, v_pages, block_tables, lengths)",
            lambda c, b, x: [
                lambda: kvp.paged_attention_with_tables(c, x, x, b.slots, b.slots),
                lambda: kvp.paged_attention_with_tables(x, x, x, b, b.slots),
            ],
        ),
    ],
)
def test_arguments_in_another_order(signature: str, call: Any) -> None:
    op = signature.partition("(")[0]
    for traced in (False, True):
        for mixed_up in call(abstract_cache(), BATCH, make_kv()):
            run = jax.jit(mixed_up) if traced else mixed_up
            wanted = rf"^{op}: \w+: wanted an? \w+.*, got .*{re.escape(signature)}"
            with pytest.raises(ValueError, match=wanted):
                run()


def test_host_integers_become_int32() -> None:
    batch = kvp.Batch([0, -1], np.asarray([0, 3, 5]))
    assert batch.slots.dtype == batch.query_offsets.dtype == jnp.int32
    batch = kvp.Batch.from_lengths((2, 0), np.asarray([3, 4]), num_tokens=10)
    assert batch.query_offsets.tolist() == [0, 3, 7]
    assert batch.num_tokens == 10
    assert kvp.Batch.from_lengths([2, 0], [3, 4]).num_tokens == 7
    assert kvp.Batch.from_lengths([2], jnp.asarray([3])).num_tokens is None
    decode = kvp.Batch.decode([3, -1, 2])
    assert decode.query_offsets.tolist() == [0, 1, 2, 3]
    assert decode.num_tokens == 3
    assert decode.mask(jnp.asarray([True, True, False])).slots.tolist() == [3, -1, -1]
    with pytest.raises(ValueError, match=r"Batch.slots: wanted integers that fit int32, got -"):
        kvp.Batch([-(2**31) - 1], [0, 1])
    # Batches pass through tree functions with leaves that are not arrays.
    assert jax.tree.map(lambda _: None, decode).num_tokens == 3


def test_positions() -> None:
    cache = abstract_cache(lengths=jnp.asarray([7, -1, 20, 0], jnp.int32))
    batch = kvp.Batch.from_lengths([2, -1, 3, 0], [2, 2, 0, 3], num_tokens=9)
    want = [20, 21, 0, 0, 7, 8, 9, 0, 0]
    assert jax.jit(kvp.positions)(cache, batch).tolist() == want
    unsaid = kvp.Batch(batch.slots, batch.query_offsets)
    assert kvp.positions(cache, unsaid, num_tokens=9).tolist() == want
    assert kvp.positions(cache, unsaid).tolist() == want[:7]
    assert kvp.positions(cache, kvp.Batch.decode([])).tolist() == []
