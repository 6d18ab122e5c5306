"""A sequence's result does not depend, bit for bit, on its neighbours, order, padding, blocks and
threads.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, append_all, attend_all, input_dtype, make_batch
from numpy.typing import NDArray

import jax_kvpage as kvp

_LAYERS, _HEADS, _GROUP, _DIM, _MAX = 2, 2, 3, 64, 1500
# (context, new tokens) of the sequences; the first one is compared.
_SEQUENCES = [(1200, 5), (3, 1), (700, 1), (0, 60), (1499, 1), (40, 17)]


class _Data:
    """Each sequence's tokens, drawn from the sequence's own seed so that they do not depend on the
    rest of the batch.
    """

    def __init__(self, index: int) -> None:
        rng = np.random.default_rng(100 + index)
        before, new = _SEQUENCES[index]
        shape = (_LAYERS, before + new, _HEADS, _DIM)
        self.k = rng.standard_normal(shape, np.float32)
        self.v = rng.standard_normal(shape, np.float32)
        self.q = rng.standard_normal((_LAYERS, new, _HEADS * _GROUP, _DIM), np.float32)


def _joined(parts: list[NDArray[np.float32]], tokens: int) -> NDArray[np.float32]:
    joined = np.concatenate(parts, axis=1)
    padding = [(0, 0)] * joined.ndim
    padding[1] = (0, tokens - joined.shape[1])
    return np.pad(joined, padding, constant_values=7.0)


def _run(
    pool: kvp.KVPool,
    order: list[int],
    *,
    padding: int = 0,
    extra_tokens: int = 0,
    scattered: bool = False,
) -> dict[int, bytes]:
    """Runs one batch with `padding` sequences in front; returns the bits of out and lse of every
    sequence in `order`.
    """
    rig = Rig(pool)
    lengths = [sum(_SEQUENCES[i]) for i in order]
    slots = rig.acquire_scattered(lengths) if scattered else [rig.acquire(n) for n in lengths]
    data = {i: _Data(i) for i in order}
    dtype = input_dtype(pool.spec)
    for slot, i in zip(slots, order, strict=True):
        before = _SEQUENCES[i][0]
        if before:
            rig.cache = append_all(
                rig.cache,
                jnp.asarray(data[i].k[:, :before], dtype),
                jnp.asarray(data[i].v[:, :before], dtype),
                make_batch([(slot, before)]),
            )
    new = [_SEQUENCES[i][1] for i in order]
    tokens = sum(new) + extra_tokens
    batch = make_batch([(-1, 0)] * padding + list(zip(slots, new, strict=True)))
    q = _joined([data[i].q for i in order], tokens)
    k = _joined([data[i].k[:, _SEQUENCES[i][0] :] for i in order], tokens)
    v = _joined([data[i].v[:, _SEQUENCES[i][0] :] for i in order], tokens)
    out, lse, rig.cache = attend_all(
        rig.cache,
        jnp.asarray(q),
        jnp.asarray(k, dtype),
        jnp.asarray(v, dtype),
        batch,
        None,
        None,
        None,
    )
    rig.release(*slots)
    starts = np.cumsum([0, *new])
    return {
        i: np.asarray(out)[:, a:b].tobytes() + np.asarray(lse)[:, a:b].tobytes()
        for i, a, b in zip(order, starts[:-1], starts[1:], strict=True)
    }


_STORAGE = [("fused", "bfloat16"), ("per_layer", "bfloat16"), ("fused", "int8")]
_STORAGE += [("per_layer", "float8_e4m3fn")]


@pytest.fixture(params=_STORAGE, ids="-".join)
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    layout, dtype = request.param
    spec = kvp.CacheSpec(_LAYERS, _HEADS, _DIM, 8, _MAX, dtype=jnp.dtype(dtype), layout=layout)
    return make_pool(spec, "64MiB", poison=True)


def test_neighbours_order_and_padding(pool: kvp.KVPool) -> None:
    alone = {i: _run(pool, [i])[i] for i in range(len(_SEQUENCES))}
    companies = [
        _run(pool, [0, 1, 2, 3, 4, 5]),
        _run(pool, [5, 3, 1, 0, 2, 4]),
        _run(pool, [3, 0], padding=3, extra_tokens=29),
        _run(pool, [4, 1, 2], extra_tokens=1),
    ]
    for company in companies:
        for i, bits in company.items():
            assert bits == alone[i], f"sequence {i} with {sorted(company)}"


def test_physical_blocks(pool: kvp.KVPool) -> None:
    plain = _run(pool, [0, 2, 4])
    pool.trim()
    assert _run(pool, [0, 2, 4], scattered=True) == plain


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_two_layouts_agree(make_pool, dtype: str) -> None:
    """Not guaranteed by the contract, but true as long as both layouts use one kernel: a difference
    is a bug.
    """
    results = []
    for layout in ("fused", "per_layer"):
        spec = kvp.CacheSpec(_LAYERS, _HEADS, _DIM, 8, _MAX, dtype=jnp.dtype(dtype), layout=layout)
        results.append(_run(make_pool(spec, "64MiB"), [0, 3]))
    assert results[0] == results[1]


def _digest() -> str:
    spec = kvp.CacheSpec(_LAYERS, _HEADS, _DIM, 8, _MAX, dtype=jnp.bfloat16)
    with kvp.KVPool(spec, "64MiB") as pool:
        bits = _run(pool, [0, 1, 2, 3, 4, 5])
    return hashlib.sha256(b"".join(bits[i] for i in sorted(bits))).hexdigest()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads(threads: int) -> None:
    """XLA's CPU client sizes its thread pool by NPROC."""
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__))],
        env=os.environ | {"NPROC": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [_digest()]


if __name__ == "__main__":
    print(_digest())
