"""The test mode that fills memory with NaN: it really does, and neither the NaN nor data of an
earlier request reaches an output.

The tests read the memory behind the pool's back, through its memory file.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch
from numpy.typing import NDArray

import jax_kvpage as kvp

_LAYERS = 2


def _memory_files() -> dict[int, int]:
    """Returns the descriptor of each memory file of this process, by inode."""
    found = {}
    for link in pathlib.Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:"):
                found[os.stat(link).st_ino] = int(link.name)
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


def _spec(layout: str) -> kvp.CacheSpec:
    return kvp.CacheSpec(_LAYERS, 2, 64, 4, 256, dtype=jnp.float32, layout=layout, block_tokens=32)


Raw = Callable[[], NDArray[np.float32]]


def _open(make_pool: Callable[..., kvp.KVPool], layout: str, **options: bool) -> tuple[Rig, Raw]:
    """Returns a rig, and a function that reads all of its pool's memory from the system."""
    before = _memory_files()
    pool = make_pool(_spec(layout), "4MiB", **options)
    (descriptor,) = (fd for inode, fd in _memory_files().items() if inode not in before)

    def raw() -> NDArray[np.float32]:
        size = os.fstat(descriptor).st_size
        return np.frombuffer(os.pread(descriptor, size, 0), np.float32)

    return Rig(pool, group=2), raw


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("mode", ["poison", "debug"])
def test_memory_is_filled_with_nan_when_it_is_handed_out(make_pool, layout: str, mode: str) -> None:
    rig, raw = _open(make_pool, layout, **{mode: True})
    slot = rig.acquire(64)
    token = rig.spec.token_bytes // 4
    assert np.count_nonzero(np.isnan(raw())) == 64 * token
    rig.write({slot: 64})
    jax.block_until_ready(rig.cache)
    assert not np.any(np.isnan(raw()))
    rig.release(slot)
    slot = rig.acquire(60)  # adopts the other slot's blocks
    rig.write({slot: 10})
    jax.block_until_ready(rig.cache)
    assert np.count_nonzero(np.isnan(raw())) == 54 * token
    # The rest of the memory holds the written values and zeros.
    values = raw()[~np.isnan(raw()) & (raw() != 0)]
    want = [x for layer in range(_LAYERS) for x in rig.model.context(slot, layer)]
    np.testing.assert_array_equal(np.sort(values), np.sort(np.concatenate(want).ravel()))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_nan_reaches_an_output(make_pool, layout: str, implementation: str | None) -> None:
    """Lengths around a block's end, so that NaN directly follows the last token."""
    rig, raw = _open(make_pool, layout, poison=True)
    for lengths in ((31, 32, 33), (1, 63, 64), (0, 100, 250)):
        slots = rig.acquire_scattered([n + 1 for n in lengths])
        rig.write({slot: n for slot, n in zip(slots, lengths, strict=True) if n})
        out, lse, want, _ = rig.step([(s, 1) for s in slots], implementation=implementation)
        assert np.any(np.isnan(raw()))
        assert np.all(np.isfinite(out))
        assert np.all(np.isfinite(lse[:, :3]))
        np.testing.assert_allclose(out, want, atol=1e-4)
        rig.release(*slots)


def test_trimmed_memory_comes_back_empty(make_pool) -> None:
    """Memory that was returned to the system is zero when it is allocated again."""
    rig, raw = _open(make_pool, "fused")
    slot = rig.acquire(128)
    rig.write({slot: 128})
    rig.release(slot)
    jax.block_until_ready(rig.cache)
    assert np.any(raw())
    rig.pool.trim()
    assert not np.any(raw())
    rig.acquire(128)
    assert not np.any(raw())


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_padding_of_a_batch_is_not_written(make_pool, layout: str) -> None:
    """Tokens of masked sequences and past the last sequence leave no trace in memory."""
    rig, raw = _open(make_pool, layout)
    slots = [rig.acquire(32), rig.acquire(32)]
    batch = make_batch([(slots[0], 2), (-1, 3), (slots[1], 1)])
    x = jnp.arange(1, 9, dtype=jnp.float32)[:, None, None] * jnp.ones((8, 2, 64))
    cache = rig.cache
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, x, x, batch, layer=layer)
    jax.block_until_ready(cache)
    values, counts = np.unique(raw(), return_counts=True)
    assert values.tolist() == [0, 1, 2, 6]
    assert set(counts[1:].tolist()) == {2 * _LAYERS * 2 * 64}
