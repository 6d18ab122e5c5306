"""Attention through a block table over plain JAX arrays: cpu and jnp, both page layouts, against
float64 and the paged op.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import num_cases, own_cases
from harness import RUN_TIME_ERRORS, Rig, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_numpy import Variant, attend_ragged, check_lse, check_output, rounded

import jax_kvpage as kvp

_PAGES, _PAGE_SIZE, _TABLE, _SEQUENCES, _TOKENS = 40, 16, 7, 5, 32
_CONFIGS = {
    "f32": ("float32", "float32", 2, 2, 64),
    "bf16": ("bfloat16", "bfloat16", 1, 4, 128),
    "f16-f32": ("float16", "float32", 3, 1, 32),
}


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "kv_layout", "implementation"))
def _attend(
    q,
    k_pages,
    v_pages,
    tables,
    lengths,
    offsets,
    window,
    sinks,
    alibi,
    *,
    scale,
    soft_cap,
    kv_layout,
    implementation,
):
    return kvp.paged_attention_with_tables(
        q,
        k_pages,
        v_pages,
        tables,
        lengths,
        query_offsets=offsets,
        scale=scale,
        sliding_window=window,
        logits_soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi,
        return_lse=True,
        kv_layout=kv_layout,
        implementation=implementation,
    )


def _optional(x):
    return None if x is None else jnp.asarray(x)


@pytest.mark.covering(2)
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", _CONFIGS)
def test_equals_float64(config: str, kv_layout: str, implementation: str | None) -> None:
    storage, query, kv_heads, group, head_dim = _CONFIGS[config]
    heads = kv_heads * group

    @own_cases((config, kv_layout, implementation))
    @settings(max_examples=num_cases(5, exhaustive=12))
    @given(
        seed=st.integers(0, 2**31),
        new=st.lists(st.sampled_from([0, 1, 1, 5, 11]), min_size=1, max_size=_SEQUENCES),
        window=st.none() | st.integers(1, _TABLE * _PAGE_SIZE),
        # All variants or none: combinations are tested with a pool, where compiling is cheap.
        with_variants=st.booleans(),
    )
    def check(seed: int, new: list[int], window: int | None, with_variants: bool) -> None:
        soft_cap = 4.0 if with_variants else None
        rng = np.random.default_rng(seed)
        while sum(new) > _TOKENS:
            new = new[:-1]
        lengths = [int(rng.integers(n, _TABLE * _PAGE_SIZE + 1)) for n in new]
        variant = Variant(
            sliding_window=window,
            logits_soft_cap=soft_cap,
            sinks=rng.normal(0, 1, heads).astype(np.float32) if with_variants else None,
            alibi_slopes=rng.uniform(0, 0.3, heads).astype(np.float32) if with_variants else None,
        )
        shape = (_PAGES, _PAGE_SIZE, kv_heads, head_dim)
        k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
        q = rng.standard_normal((_TOKENS, heads, head_dim), np.float32)
        # Entries past a sequence's last page are never read, so they may be anything.
        tables = rng.integers(-5, 10**6, (_SEQUENCES, _TABLE))
        pages = rng.permutation(_PAGES)
        taken = 0
        for s, length in enumerate(lengths):
            used = -(-length // _PAGE_SIZE)
            tables[s, :used] = pages[taken : taken + used]
            taken += used
        k64, v64 = rounded(k, storage), rounded(v, storage)
        contexts = []
        for s, length in enumerate(lengths):
            used = tables[s, : -(-length // _PAGE_SIZE)]
            contexts.append(
                tuple(x[used].reshape(-1, kv_heads, head_dim)[:length] for x in (k64, v64))
            )
        empty = _SEQUENCES - len(new)
        offsets = np.cumsum([0] + list(new) + [0] * empty)
        order = (0, 1, 2, 3) if kv_layout == "NHD" else (0, 2, 1, 3)
        out, lse = _attend(
            jnp.asarray(q, jnp.dtype(query)),
            jnp.asarray(k.transpose(order), jnp.dtype(storage)),
            jnp.asarray(v.transpose(order), jnp.dtype(storage)),
            jnp.asarray(tables, jnp.int32),
            jnp.asarray(lengths + [0] * empty, jnp.int32),
            jnp.asarray(offsets, jnp.int32),
            _optional(window),
            _optional(variant.sinks),
            _optional(variant.alibi_slopes),
            scale=None,
            soft_cap=soft_cap,
            kv_layout=kv_layout,
            implementation=implementation,
        )
        want_out, want_lse = attend_ragged(
            rounded(q, query),
            contexts,
            [n - m for n, m in zip(lengths, new, strict=True)],
            offsets,
            variant,
        )
        check_output(out, want_out, query, 6.0)
        check_lse(lse, want_lse)

    check()


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_decode_needs_no_offsets(implementation: str | None) -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 6, 16, 2, 64), np.float32)
    q = rng.standard_normal((2, 4, 64), np.float32)
    tables = jnp.asarray([[5, 2], [0, 3]], jnp.int32)
    lengths = jnp.asarray([20, 9], jnp.int32)
    out = kvp.paged_attention_with_tables(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        tables,
        lengths,
        implementation=implementation,
    )
    contexts = [
        tuple(x[np.asarray(tables[s])].reshape(32, 2, 64)[: lengths[s]] for x in (k, v))
        for s in range(2)
    ]
    want, _ = attend_ragged(q, contexts, [19, 8], [0, 1, 2])
    check_output(out, want, jnp.float32, 6.0)


def test_equals_paged_attention_bit_for_bit(make_pool) -> None:
    """The same tokens in a pool and in pages: the same kernel, so the same result."""
    spec = kvp.CacheSpec(1, 2, 64, 4, 256, dtype=jnp.float32)
    pool = make_pool(spec)
    rig = Rig(pool, group=2)
    slots = [rig.acquire(200), rig.acquire(50)]
    rig.write({slots[0]: 175, slots[1]: 47})
    rig.append([(slots[0], 5), (slots[1], 3)])
    q = rig.random_q(8)[0]
    tables = np.arange(2 * 13, dtype=np.int32).reshape(2, 13)
    pages = np.zeros((2, 26, 16, 2, 64), np.float32)
    for s, slot in enumerate(slots):
        for which, x in enumerate(rig.model.context(slot, 0)):
            padded = np.zeros((13 * 16, 2, 64), np.float32)
            padded[: len(x)] = x
            pages[which, tables[s]] = padded.reshape(13, 16, 2, 64)
    batch = make_batch([(slots[0], 5), (slots[1], 3)])
    paged = kvp.paged_attention(jnp.asarray(q), rig.cache, batch, layer=0)
    tabled = kvp.paged_attention_with_tables(
        jnp.asarray(q),
        jnp.asarray(pages[0]),
        jnp.asarray(pages[1]),
        jnp.asarray(tables),
        jnp.asarray([180, 50], jnp.int32),
        query_offsets=batch.query_offsets,
        implementation="cpu",
    )
    np.testing.assert_array_equal(np.asarray(paged), np.asarray(tabled))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_an_empty_sequence_is_padding(implementation: str | None) -> None:
    """Length 0 in a decode step of fixed shape: nothing to attend to, output 0 and lse -inf."""
    good = _good() | {"lengths": jnp.asarray([0, 3], jnp.int32)}
    good["v_pages"] = good["v_pages"] + 1
    out, lse = kvp.paged_attention_with_tables(
        **good, return_lse=True, implementation=implementation
    )
    assert np.all(np.asarray(out[0]) == 0)
    assert np.all(np.isneginf(lse[0]))
    np.testing.assert_allclose(out[1], 1.0, rtol=1e-6)


def _good() -> dict[str, object]:
    return {
        "q": jnp.zeros((2, 4, 64)),
        "k_pages": jnp.zeros((6, 16, 2, 64)),
        "v_pages": jnp.zeros((6, 16, 2, 64)),
        "block_tables": jnp.zeros((2, 2), jnp.int32),
        "lengths": jnp.ones(2, jnp.int32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_pages": jnp.zeros((5, 16, 2, 64))}, "v_pages"),
        ({"q": jnp.zeros((2, 3, 64))}, "multiple"),
        ({"q": jnp.zeros((2, 4, 32))}, "D=64"),
        ({"block_tables": jnp.zeros((2, 2), jnp.float32)}, "block_tables"),
        ({"lengths": jnp.ones(3, jnp.int32)}, "lengths"),
        ({"kv_layout": "DHN"}, "kv_layout"),
        ({"implementation": "tpu"}, "implementation"),
        ({"query_offsets": jnp.zeros(2, jnp.int32)}, "query_offsets"),
        ({"q": jnp.zeros((3, 4, 64))}, "query_offsets"),
        ({"sliding_window": 0}, "window"),
        ({"sinks": jnp.zeros(3)}, "sinks"),
        ({"alibi_slopes": jnp.zeros((4, 1))}, "alibi"),
    ],
)
def test_mistakes_are_reported(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        kvp.paged_attention_with_tables(**(_good() | change))


def test_all_mistakes_in_one_error() -> None:
    with pytest.raises(ValueError) as caught:
        kvp.paged_attention_with_tables(
            **(_good() | {"q": jnp.zeros((2, 3, 32)), "sinks": jnp.zeros(7), "kv_layout": "x"})
        )
    for word in ("multiple", "sinks", "kv_layout"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "lengths", "offsets", "message"),
    [
        ([[0, 9], [1, 1]], [20, 9], [0, 1, 2], "page|block"),
        ([[0, -1], [1, 1]], [20, 9], [0, 1, 2], "page|block"),
        ([[0, 1], [1, 1]], [33, 9], [0, 1, 2], "33"),
        ([[0, 1], [1, 1]], [20, 1], [0, 1, 3], "offset"),
        ([[0, 1], [1, 1]], [1, 9], [0, 2, 2], "2.*1"),
        ([[0, 1], [1, 1]], [20, 9], [0, 2, 1], "offset"),
        ([[0, 1], [1, 1]], [20, 9], [1, 1, 2], "offset"),
    ],
)
def test_bad_values_are_errors_on_cpu(tables, lengths, offsets, message: str) -> None:
    good = _good() | {
        "block_tables": jnp.asarray(tables, jnp.int32),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "query_offsets": jnp.asarray(offsets, jnp.int32),
        "implementation": "cpu",
    }
    with pytest.raises(RUN_TIME_ERRORS, match=f"(?i){message}"):
        jax.block_until_ready(kvp.paged_attention_with_tables(**good))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_an_array_without_pages(implementation: str | None) -> None:
    pages = jnp.zeros((0, _PAGE_SIZE, 2, 64))
    out = kvp.paged_attention_with_tables(
        jnp.ones((1, 4, 64)), pages, pages, np.zeros((1, 1), np.int32), np.zeros(1, np.int32),
        query_offsets=np.zeros(2, np.int32), implementation=implementation,
    )  # fmt: skip
    assert not np.asarray(out).any()


def test_errors_name_the_op_that_was_called() -> None:
    good = _good()
    q = good.pop("q")
    name = "paged_attention_with_tables"
    with pytest.raises(ValueError, match=f"^{name} cannot be differentiated: it is for inference"):
        jax.grad(lambda q: kvp.paged_attention_with_tables(q, **good).sum())(q)
    with pytest.raises(ValueError, match=f"^{name}: implementation='cuda'"):
        kvp.paged_attention_with_tables(q, **good, implementation="cuda")
