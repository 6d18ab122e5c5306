"""Attention on a GPU equals float64: the CPU cases, other block sizes, longer contexts."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CONFIGS, Case, Config, Rigs, cases
from harness import Rig, input_dtype
from hypothesis import given, settings
from reference_numpy import Variant, check_lse, check_output
from test_attention_property import (
    test_large_logits_do_not_overflow as test_large_logits_do_not_overflow,
)
from test_tables import test_an_empty_sequence_is_padding as test_an_empty_sequence_is_padding
from test_tables import test_decode_needs_no_offsets as test_decode_needs_no_offsets
from test_tables import test_equals_float64 as test_tables_equal_float64

import jax_kvpage as kvp

__all__ = ["test_tables_equal_float64"]

pytestmark = pytest.mark.gpu

# Shapes with specialized kernels (head sizes 64, 128, 256; groups of 1 to 16), and others.
_MORE = [
    Config("fused", "bfloat16", "bfloat16", 8, 4, 128),
    Config("fused", "float16", "float16", 1, 16, 128),
    Config("fused", "bfloat16", "bfloat16", 2, 7, 64),
    Config("fused", "bfloat16", "bfloat16", 1, 2, 256),
    Config("fused", "float32", "float32", 2, 1, 128),
    Config("fused", "bfloat16", "bfloat16", 3, 1, 80),
    Config("fused", "int8", "bfloat16", 2, 4, 64),
    Config("fused", "float8_e4m3fn", "bfloat16", 2, 4, 128),
    Config("per_layer", "int8", "float16", 2, 8, 128),
    Config("fused", "float8_e4m3fn", "float16", 1, 2, 256),
]


@pytest.fixture(scope="module")
def rigs() -> Iterator[Rigs]:
    """Pools with blocks of 32 tokens if the layout can pad them, so that contexts span many
    blocks.
    """
    rigs = Rigs(None, block_tokens=32)
    yield rigs
    rigs.close()


@pytest.mark.parametrize("config", [*CONFIGS, *_MORE], ids=str)
def test_equals_float64(rigs: Rigs, config: Config, implementation: str) -> None:
    @settings(max_examples=20)
    @given(cases(config))
    def check(case: Case) -> None:
        rigs.check(config, case, implementation)

    check()


@pytest.mark.parametrize("config", [CONFIGS[i] for i in (2, 5, 12)], ids=str)
def test_plain_implementation_equals_float64(rigs: Rigs, config: Config) -> None:
    """`implementation="xla"` reads the cache through the gather kernel."""

    @settings(max_examples=8)
    @given(cases(config, few_programs=True))
    def check(case: Case) -> None:
        rigs.check(config, case, "xla")

    check()


@pytest.mark.parametrize("precision", ["default", "highest"])  # tensor cores, exact weights
@pytest.mark.parametrize("config", [CONFIGS[2], _MORE[0], _MORE[1], CONFIGS[12]], ids=str)
def test_kernels_equal_the_plain_implementation(make_pool, config: Config, precision: str) -> None:
    """Both compute the same step from the same cache."""
    spec = kvp.CacheSpec(
        2, config.num_kv_heads, config.head_dim, 4, 700, dtype=jnp.dtype(config.storage)
    )
    pool = make_pool(spec, "256MiB", on_stale="allow", poison=True)
    rig = Rig(pool, group=config.group, query_dtype=jnp.dtype(config.query), max_tokens=80)
    slots = [rig.acquire(n) for n in (690, 300, 60)]
    rig.write({slots[0]: 650, slots[1]: 257})
    batch = kvp.Batch.from_lengths(slots, [1, 33, 46])
    k, v = rig.random_kv(80)
    for layer in range(2):
        dtype = input_dtype(pool.spec)
        rig.cache = kvp.append_kv(
            rig.cache,
            jnp.asarray(k[layer], dtype),
            jnp.asarray(v[layer], dtype),
            batch,
            layer=layer,
        )
    q = jnp.asarray(rig.random_q(80)[0], jnp.dtype(config.query))
    with jax.default_matmul_precision(precision):
        outs = [
            kvp.paged_attention(
                q, rig.cache, batch, layer=1, logits_soft_cap=20.0, implementation=implementation
            )
            for implementation in (None, "xla")
        ]
    check_output(outs[0], np.asarray(outs[1], np.float64), jnp.dtype(config.query), 6.0)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_long_contexts(make_pool, layout: str, dtype: str) -> None:
    """Contexts that are split: around powers of two, longer than one block in either layout, one
    long sequence alone and among short ones.
    """
    heads, dim = 8, 128
    spec = kvp.CacheSpec(1, heads, dim, 5, 6000, dtype=jnp.dtype(dtype), layout=layout)
    pool = make_pool(spec, "512MiB", poison=True)
    query = input_dtype(spec)
    rig = Rig(pool, group=2, query_dtype=query, max_tokens=1024, max_sequences=4)
    lengths = (255, 511, 1030, 5500)
    slots = rig.acquire_scattered([n + 20 for n in lengths])
    rig.write(dict(zip(slots, lengths, strict=True)))
    rig.max_tokens = 16
    for sequences, variant in (
        ([(slots[3], 1)], Variant()),
        ([(slots[0], 1), (slots[1], 5), (slots[2], 1), (slots[3], 3)], Variant()),
        (
            [(slots[0], 1), (slots[1], 1), (slots[2], 1), (slots[3], 1)],
            Variant(sliding_window=700, sinks=np.linspace(-1, 1, 2 * heads, dtype=np.float32)),
        ),
    ):
        out, lse, want_out, want_lse = rig.step(sequences, variant)
        check_output(out, want_out, query, 6.0)
        check_lse(lse, want_lse)


@pytest.mark.parametrize("new", [1, 64, 129])
def test_more_sequences_than_multiprocessors(make_pool, new: int) -> None:
    """A large ragged batch with padding sequences in it."""
    spec = kvp.CacheSpec(1, 2, 64, 160, 400, dtype=jnp.bfloat16, block_tokens=64)
    pool = make_pool(spec, "1GiB")
    rig = Rig(pool, group=4, query_dtype=jnp.bfloat16, max_tokens=160 * 2 + 2 * new)
    rig.max_sequences = 170
    lengths = [1 + 37 * i % 250 for i in range(150)]
    slots = rig.acquire_scattered([n + new + 1 for n in lengths])
    rig.write(dict(zip(slots, lengths, strict=True)))
    sequences = [(slot, 1 + i % 2) for i, slot in enumerate(slots)]
    sequences[7:7] = [(-1, 0)] * 10
    sequences[3] = (sequences[3][0], new)
    out, lse, want_out, want_lse = rig.step(sequences)
    check_output(out, want_out, jnp.bfloat16, 6.0)
    check_lse(lse, want_lse)
