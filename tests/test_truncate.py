"""truncate: private copies of shared blocks, block counts, and the order relative to queued
programs.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, busy, make_batch
from sharing_rig import check, filled, fork, grow, pool_of, spec_of, truncate

import jax_kvpage as kvp


@pytest.fixture
def rig(make_pool, layout: str) -> tuple[Rig, int]:
    """A sequence of 70 tokens in blocks of 16; memory is poisoned before a request gets it."""
    return filled(pool_of(make_pool, spec_of(layout), 64, poison=True), 70)


def test_truncate_makes_private_copies(rig) -> None:
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    before = rig.pool.stats().blocks_mapped
    ranges = len(rig.pool.block_map(slot))
    for target, length in ((slot, 40), (other, 33), (other, 5), (slot, 0)):
        truncate(rig, target, length)
        assert rig.pool.committed(target) == list(range(length))
        check(rig, [slot, other])
        truncate(rig, target, length)
    rig.pool.check(rig.cache)
    # No block is shared any more.
    assert rig.pool.stats().blocks_shared == 0
    assert rig.pool.stats().blocks_mapped == before + 4 * ranges
    check(rig, [slot, other])


def test_the_last_sharer_of_one_call_needs_no_copies(rig) -> None:
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    before = rig.pool.stats().blocks_mapped
    rig.cache = rig.pool.truncate(rig.cache, [other, slot], [5, 20])
    rig.model.truncate(other, 5)
    rig.model.truncate(slot, 20)
    assert rig.pool.stats().blocks_mapped == before + 4 * len(rig.pool.block_map(slot))
    rig.pool.check(rig.cache)
    assert rig.pool.stats().blocks_mapped == before + 4 * len(rig.pool.block_map(slot))
    assert rig.pool.stats().blocks_shared == 0
    check(rig, [slot, other])


def test_a_truncation_whose_program_fails_gives_its_blocks_back(rig) -> None:
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    rig.cache = kvp.set_lengths(rig.cache, [slot], [70])
    truncate(rig, slot, 70)  # compiles everything
    rig.pool.check(rig.cache)
    before = rig.pool.stats().blocks_mapped
    failing = kvp.set_lengths(kvp.after(rig.cache, busy(1)), [slot], [99])
    queued = rig.pool.truncate(failing, slot, 20)
    assert rig.pool.stats().blocks_mapped == before + 3 * len(rig.pool.block_map(slot))
    with pytest.raises(RUN_TIME_ERRORS):
        rig.pool.check(queued)
    rig.cache = rig.pool.cache()
    assert rig.pool.stats().blocks_mapped == before
    check(rig, [slot, other])
    truncate(rig, slot, 20)
    check(rig, [slot, other])


def test_truncate_of_an_unshared_sequence_copies_nothing(rig) -> None:
    rig, slot = rig
    before = rig.pool.stats()
    rig.cache = rig.pool.truncate(rig.cache, [slot], [20])
    rig.model.truncate(slot, 20)
    after = rig.pool.stats()
    assert (after.blocks_mapped, after.system_calls) == (before.blocks_mapped, before.system_calls)
    check(rig, [slot])


def test_truncate_under_queued_readers(rig) -> None:
    """One queued program reads the slot and another truncates it; both see the same tokens."""
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    q = rig.random_q(1)
    grow(rig, slot)
    rig.append([(slot, 1)])
    late = kvp.after(
        rig.cache, busy(1)
    )  # the readers of this cache run after the truncation is queued
    out = kvp.paged_attention(jnp.asarray(q[0]), late, make_batch([(slot, 1)]), layer=0)
    rig.cache = rig.pool.truncate(kvp.after(late, out), slot, 17)
    want, _ = rig.reference([(slot, 1)], q)
    np.testing.assert_allclose(np.asarray(out), want[0], atol=1e-4)
    rig.model.truncate(slot, 17)
    check(rig, [slot, other])


def test_a_truncation_that_finds_no_blocks_changes_nothing(make_pool, layout: str) -> None:
    pool = pool_of(make_pool, spec_of(layout), 4 * 5)
    rig, slot = filled(pool, 80)
    if layout == "fused":
        pool.resize(5 * pool.spec.block_bytes)
    other = fork(rig, slot, 1)[0]
    before = pool.stats()
    with pytest.raises(kvp.OutOfBlocks, match=r"truncate: .* blocks wanted"):
        pool.truncate(rig.cache, other, 10)
    assert pool.stats() == before
    assert len(pool.committed(other)) == 80
    rig.release(slot)
    pool.check(rig.cache)
    truncate(rig, other, 10)  # the blocks are no longer shared
    pool.check(rig.cache)
    check(rig, [other])


@pytest.mark.parametrize("shared", [False, True])
def test_a_fork_behind_a_queued_truncation(rig, shared: bool) -> None:
    """Blocks that the truncation may still replace are copied, not mapped in the fork."""
    rig, slot = rig
    others = fork(rig, slot, 1) if shared else []
    before = rig.pool.stats().blocks_mapped
    rig.cache = kvp.after(rig.cache, busy(1))
    truncate(rig, slot, 20)
    rig.write({slot: 50})
    rig.pool.commit(slot, range(50))
    others += fork(rig, slot, 1)
    rig.pool.check(rig.cache)
    ranges = len(rig.pool.block_map(slot))
    assert rig.pool.stats().blocks_mapped - before == (4 + 3 * shared) * ranges
    check(rig, [slot, *others])
    others += fork(rig, slot, 1)  # the truncation has run: full blocks are shared again
    assert rig.pool.stats().blocks_shared >= 4 * ranges
    check(rig, [slot, *others])


def test_hosts_may_fork_before_the_prefill_has_run(make_pool, layout: str) -> None:
    """commit and fork count on queued programs, without conflicting with them."""
    pool = pool_of(make_pool, spec_of(layout), 64)
    rig = Rig(pool, max_tokens=70)
    slot = rig.acquire(70)
    rig.write({slot: 20})
    rig.cache = kvp.after(rig.cache, busy(1))
    rig.cache = kvp.set_lengths(rig.cache, [slot], [0])  # a queued rollback is not an error
    rig.model.truncate(slot, 0)
    rig.write({slot: 70})
    pool.commit(slot, range(70))
    slots = fork(rig, slot, 2)
    truncate(rig, slots[0], 30)
    check(rig, [slot, *slots])
