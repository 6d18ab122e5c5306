"""`KVPool.relocate` merges mappings and changes nothing else."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import busy
from prefix_rig import BLOCK, PrefixRig, spec_of

import jax_kvpage as kvp

_TEXTS = [[head, *range(400)] for head in (1000, 2000, 3000)]


def _system_mappings() -> int:
    """Returns this process's mappings of pool memory, which does not rely on the pool's own
    figure.
    """
    return pathlib.Path("/proc/self/maps").read_text().count("memfd:jax_kvpage")


def _fragmented(make_pool, layout: str, dtype: object) -> PrefixRig:
    """Three sequences of 288 tokens that grew in turns, in slots that are now parked."""
    spec = spec_of(layout, dtype)
    size = spec.resolve("cpu").block_bytes
    rig = PrefixRig(make_pool(spec, 80 * size * (1 if layout == "fused" else 4), poison=True))
    slots = [rig.acquire(text[:BLOCK])[0] for text in _TEXTS]
    for end in range(2 * BLOCK, 288 + 1, BLOCK):
        for slot, text in zip(slots, _TEXTS, strict=True):
            rig.write(slot, text[end - BLOCK : end])
    rig.release(*slots)
    return rig


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_mappings_merge_and_contents_stay(make_pool, layout: str, dtype: object) -> None:
    rig = _fragmented(make_pool, layout, dtype)
    # Two requests share one sequence; the first of them is then released.
    first, found = rig.acquire(_TEXTS[0][:300])
    assert found == 288
    (second,), rig.cache = rig.pool.fork(rig.cache, first, 1)
    rig.ids[second] = list(rig.ids[first])
    rig.release(first)
    read = jax.jit(lambda cache, slots: [kvp.read_kv(cache, slots, layer) for layer in (0, 1)])
    before = jax.tree.map(np.asarray, read(rig.cache, jnp.asarray([second])))
    mappings, stats, calls = _system_mappings(), rig.pool.stats(), rig.pool.stats().system_calls

    report = rig.pool.relocate()

    ranges = 1 if layout == "fused" else 4
    assert report.mappings_before == stats.memory_mappings > 40 * ranges
    assert report.mappings_after == rig.pool.stats().memory_mappings < 10 * ranges
    assert mappings - _system_mappings() >= report.mappings_before - report.mappings_after - 1
    assert report.bytes_copied == report.blocks_moved * rig.pool.spec.block_bytes > 0
    after = rig.pool.stats()
    for field in ("blocks_free", "blocks_parked", "blocks_shared", "blocks_cached", "physical"):
        assert getattr(after, field) == getattr(stats, field), field
    assert (after.waits, after.prefix_tokens) == (stats.waits, stats.prefix_tokens)
    assert after.system_calls > calls
    got = jax.tree.map(np.asarray, read(rig.cache, jnp.asarray([second])))
    jax.tree.map(np.testing.assert_array_equal, got, before)  # bit for bit
    for text in _TEXTS[1:]:
        assert rig.acquire(text[:300])[1] == 288
    rig.check()
    rig.write(second, range(40))
    rig.check()
    assert rig.pool.relocate(slots=second).mappings_after <= after.memory_mappings + 4 * ranges


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_no_program_waits(make_pool, layout: str) -> None:
    """With a second of work in flight on another slot, relocation returns at once."""
    rig = _fragmented(make_pool, layout, jnp.float32)
    slot, _ = rig.acquire([5, *range(40)])
    rig.pool.check(rig.cache)
    waits, value = rig.pool.stats().waits, busy(2)
    rig.cache = kvp.after(rig.cache, value)
    rig.write(slot, range(20))
    report = rig.pool.relocate()
    assert not value.is_ready()
    assert report.mappings_after < report.mappings_before
    assert rig.pool.stats().waits == waits
    rig.pool.check(rig.cache)
    rig.check()


def test_bounds_and_refusals(make_pool) -> None:
    rig = _fragmented(make_pool, "fused", jnp.float32)
    block = rig.pool.spec.block_bytes
    assert rig.pool.relocate(slots=[]).blocks_moved == 0
    assert rig.pool.relocate(block - 1).blocks_moved == 0
    assert 0 < rig.pool.relocate(f"{5 * block}").blocks_moved <= 5
    for wrong in (0, -1, "many", None):
        with pytest.raises(ValueError, match="relocate: max_bytes: wanted a positive number"):
            rig.pool.relocate(wrong)
    for slot in (-1, 8):
        with pytest.raises(ValueError, match=rf"relocate: slot {slot} does not exist"):
            rig.pool.relocate(slots=[0, slot])
    with pytest.raises(ValueError, match="relocate: slots"):
        rig.pool.relocate(slots="all")
    rig.pool.close()
    with pytest.raises(kvp.PoolClosed):
        rig.pool.relocate()


def test_huge_pages_are_made_or_refused_in_words(make_pool) -> None:
    """Prefixes of 1024 tokens fill a huge page. The report says whether the system made one."""
    spec = spec_of("fused", max_seq_len=2048)
    rig = PrefixRig(make_pool(spec, 200 * spec.resolve("cpu").block_bytes))
    texts = [[head, *range(1049)] for head in (1000, 2000)]
    slots = [rig.acquire(text[:BLOCK])[0] for text in texts]
    for end in range(BLOCK, 1050, 64):
        for slot, text in zip(slots, texts, strict=True):
            rig.write(slot, text[end : min(end + 64, 1050)])
    rig.release(*slots)
    plain = rig.pool.relocate()
    assert (plain.huge_pages, plain.huge_refused) == (0, None)
    report = rig.pool.relocate(huge_pages=True)
    assert (report.huge_pages == 0) == (report.huge_refused is not None), report
    assert report.mappings_after <= plain.mappings_after + 2
    slot, found = rig.acquire([*texts[0], 5])
    assert found == 1050
    (fork,), rig.cache = rig.pool.fork(rig.cache, slot, 1)
    rig.ids[fork] = list(rig.ids[slot])
    assert rig.acquire(texts[1])[1] >= 1024
    rig.check()
    rig.write(fork, range(20))
    rig.check()
    with pytest.raises(ValueError, match="relocate: huge_pages"):
        rig.pool.relocate(huge_pages="yes")
