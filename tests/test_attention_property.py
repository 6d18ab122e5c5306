"""Attention on CPU equals float64 NumPy for random ragged batches of every dtype, layout, head size
and variant (attention_cases.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CONFIGS, XLA_CONFIGS, Case, Config, Rigs, cases
from covering import num_cases, own_cases
from harness import Rig, input_dtype
from hypothesis import given, settings
from reference_numpy import Variant, check_lse, check_output

import jax_kvpage as kvp

_MAX_SEQ_LEN = 200


@pytest.fixture(scope="module")
def rigs() -> Iterator[Rigs]:
    rigs = Rigs()
    yield rigs
    rigs.close()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_cpu_equals_float64(rigs: Rigs, config: Config) -> None:
    @own_cases(config)
    @settings(max_examples=num_cases(6, exhaustive=30))
    @given(cases(config))
    def check(case: Case) -> None:
        rigs.check(config, case, "cpu")

    check()


@pytest.mark.parametrize("config", XLA_CONFIGS, ids=str)
def test_xla_equals_float64(rigs: Rigs, config: Config) -> None:
    @own_cases(config)
    @settings(max_examples=num_cases(4, exhaustive=15))
    @given(cases(config, few_programs=True))
    def check(case: Case) -> None:
        rigs.check(config, case, "xla")

    check()


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_long_contexts(layout: str, dtype: str) -> None:
    """Contexts long enough to be split by the kernel, at lengths around the powers of two where
    splits would end.
    """
    spec = kvp.CacheSpec(1, 1, 64, 4, 5000, dtype=jnp.dtype(dtype), layout=layout)
    with kvp.KVPool(spec, "64MiB", poison=True) as pool:
        query = input_dtype(spec)
        rig = Rig(pool, group=2, query_dtype=query, max_tokens=1024, max_sequences=4)
        lengths = (255, 511, 1030, 4097)
        slots = rig.acquire_scattered([n + 20 for n in lengths])
        rig.write(dict(zip(slots, lengths, strict=True)))
        rig.max_tokens = 16
        for variant in (
            Variant(),
            Variant(sliding_window=700, sinks=np.asarray([0.5, -1.0], np.float32)),
        ):
            out, lse, want_out, want_lse = rig.step(
                [(slots[0], 1), (slots[1], 5), (slots[2], 1), (slots[3], 3)], variant
            )
            check_output(out, want_out, query, 6.0)
            check_lse(lse, want_lse)


def test_blocks_are_scattered(make_pool) -> None:
    """Checks what the property test relies on: adjacent blocks of a slot are not adjacent in the
    pool.
    """
    for layout in ("fused", "per_layer"):
        spec = kvp.CacheSpec(1, 2, 64, 4, _MAX_SEQ_LEN, dtype=jnp.float32, layout=layout)
        pool = make_pool(spec, "8MiB")
        rig = Rig(pool)
        blocks = np.asarray(
            [pool.block_map(slot) for slot in rig.acquire_scattered([_MAX_SEQ_LEN] * 3)]
        )[..., 0]
        neighbours = np.mean(np.abs(np.diff(blocks, axis=-1)) == 1)
        assert neighbours < 0.7, (layout, neighbours)


def test_large_logits_do_not_overflow(make_pool) -> None:
    """Logits in the thousands, for which a softmax without the running maximum gives inf / inf."""
    spec = kvp.CacheSpec(1, 2, 64, 2, 128, dtype=jnp.float32)
    rig = Rig(make_pool(spec), group=2)
    slot = rig.acquire(100)
    rig.write({slot: 60})
    out, lse, want_out, _ = rig.step([(slot, 40)], Variant(scale=100.0))
    # One float32 ulp of a logit of 1e4 is 1e-3, and so is the relative error of its weight.
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(lse[:, :40]))
    assert np.max(np.abs(out - want_out)) < 0.05
