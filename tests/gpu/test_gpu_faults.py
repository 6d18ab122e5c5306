"""Faults in programs on a GPU: the results are NaN, nothing is written, and the next host call
raises the same message as on CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, make_batch, settle
from mistakes import append, attend, fails, kv, live, make_spec, q, two_sequences
from test_failure_recovery import _spec as recovery_spec
from test_failure_recovery import (
    test_failure_in_the_middle_of_a_scan as test_failure_in_the_middle_of_a_scan,
)
from test_failure_recovery import (
    test_failure_in_the_middle_of_a_step as test_failure_in_the_middle_of_a_step,
)
from test_failure_recovery import (
    test_one_sequence_runs_out_of_memory_in_a_scan as test_one_sequence_runs_out_of_memory,
)
from test_failure_recovery import (
    test_programs_queued_behind_a_failure_fail_too as test_programs_queued_behind_a_failure,
)
from test_safety import (
    test_a_failed_program_writes_nothing as test_a_failed_program_writes_nothing,
)
from test_safety import (
    test_a_new_generation_forgets_what_was_not_advanced as test_a_new_generation_forgets,
)
from test_safety import test_advancing_past_what_is_written as test_advancing_past_what_is_written
from test_safety import test_bad_slots_in_a_batch as test_bad_slots_in_a_batch
from test_safety import test_bad_slots_in_a_list as test_bad_slots_in_a_list
from test_safety import test_failures_do_not_add_up as test_failures_do_not_add_up
from test_safety import test_layer_out_of_range as test_layer_out_of_range
from test_safety import test_malformed_offsets as test_malformed_offsets
from test_safety import test_negative_token_counts as test_negative_token_counts
from test_safety import test_past_max_seq_len as test_past_max_seq_len
from test_safety import (
    test_raising_a_length_past_what_is_written as test_raising_a_length_past_what_is_written,
)
from test_safety import test_reading_what_was_not_written as test_reading_what_was_not_written
from test_safety import test_writing_past_what_is_mapped as test_writing_past_what_is_mapped
from test_stale import (
    test_a_released_slot_cannot_be_read_through_an_old_cache as test_a_released_slot_cannot_be_read,
)
from test_stale import test_check_raises_what_went_wrong as test_check_raises_what_went_wrong
from test_stale import test_older_generations_are_stale as test_older_generations_are_stale
from test_stale import test_on_stale_allow_repeats_a_step as test_on_stale_allow_repeats_a_step
from test_stale import (
    test_readers_may_be_older_until_something_is_destroyed as test_readers_may_be_older,
)
from test_stale import test_stale_mutator as test_stale_mutator

import jax_kvpage as kvp

__all__ = [
    "test_a_new_generation_forgets",
    "test_a_released_slot_cannot_be_read",
    "test_one_sequence_runs_out_of_memory",
    "test_programs_queued_behind_a_failure",
    "test_readers_may_be_older",
]

pytestmark = pytest.mark.gpu


@pytest.fixture
def rig(make_pool) -> Iterator[Rig]:
    """Blocks of 32 tokens, which only the fused layout can pad to the mapping granularity."""
    with warnings.catch_warnings():
        # A new generation warns of faults that were never reported: tests here leave some on
        # purpose.
        warnings.filterwarnings("ignore", "before this new generation", RuntimeWarning)
        yield from two_sequences(make_pool(make_spec("fused"), poison=True))


@pytest.fixture
def pool(make_pool) -> kvp.KVPool:
    return make_pool(recovery_spec("fused"), "8MiB", poison=True)


def _nothing_written(rig: Rig, bad: kvp.Batch) -> None:
    """Asserts that a bad batch leaves the contents of the slots unchanged, layer by layer."""
    slots = live(rig)
    good = make_batch([(slot, 1) for slot in slots])
    rig.append([(slot, 1) for slot in slots])
    before = [np.asarray(attend(rig.cache, good, layer)) for layer in range(3)]
    for layer in range(3):
        fails("slot", lambda layer=layer: append(rig.cache, bad, layer))
    after = [np.asarray(attend(rig.cache, good, layer)) for layer in range(3)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[: len(slots)], b[: len(slots)])


def test_a_bad_sequence_keeps_the_good_ones_from_being_written(rig: Rig) -> None:
    slots = live(rig)
    _nothing_written(rig, make_batch([(slots[0], 1), (slots[1], 1), (slots[1], 1)]))


def test_a_fault_is_raised_once_and_the_pool_goes_on(rig: Rig) -> None:
    """The first fault is kept and cleared when reported; the same generation then continues."""
    slot = live(rig)[0]

    def two_mistakes() -> None:
        append(rig.cache, make_batch([(slot, 1), (slot, 1)]))
        settle(append(rig.cache, make_batch([(slot, 100)]), tokens=100))

    with pytest.raises(RUN_TIME_ERRORS, match="twice"):
        two_mistakes()
    settle(rig.cache)
    rig.pool.check(rig.cache)
    out, _, want, _ = rig.step([(slot, 3)])
    np.testing.assert_allclose(out, want, atol=1e-4)


def test_a_fault_in_flight_is_found_by_check(rig: Rig, platform: str) -> None:
    if platform == "cpu":
        pytest.skip("on CPU JAX raises it")
    slot = live(rig)[0]
    out = attend(rig.cache, make_batch([(slot, 7)]))
    with pytest.raises(kvp.DeviceFault, match=r"(?s)paged_attention.*written"):
        rig.pool.check(dataclasses.replace(rig.cache, epoch=rig.cache.epoch + 0 * _bits(out)))


def _bits(out: jax.Array) -> jax.Array:
    return jnp.isnan(out[0, 0, :1]).astype(jnp.uint32)


def test_one_call_with_everything_is_all_or_nothing(rig: Rig) -> None:
    """update_and_attend writes before it attends: a bad batch must do neither."""
    slots = live(rig)
    bad = make_batch([(slots[0], 1), (slots[1], 1), (slots[1], 1)])
    fails("twice", lambda: kvp.update_and_attend(q(), *kv(), rig.cache, bad, layer=0)[0])
    fails("24.*20|21.*20", lambda: attend(rig.cache, make_batch([(slots[0], 4)])))


def test_programs_of_a_closed_pool(make_pool, platform: str) -> None:
    pool = make_pool(make_spec("fused"))
    slot, cache = pool.acquire(pool.cache(), 10)
    program = jax.jit(lambda cache: attend(cache, make_batch([(slot, 1)])))
    program.lower(cache).compile()
    pool.close()
    if platform == "cuda":
        assert bool(jnp.all(jnp.isnan(program(cache))))
    else:
        fails("pool.*closed", lambda: program(cache))
    for call in (pool.cache, lambda: pool.acquire(cache, 1), lambda: pool.extend(slot, 20)):
        with pytest.raises(kvp.PoolClosed, match="closed"):
            call()


def test_caches_of_no_pool_and_of_another_spec(rig: Rig, make_pool, platform: str) -> None:
    spec = dataclasses.replace(rig.spec, max_slots=rig.spec.max_slots + 1)
    other = make_pool(spec)
    theirs = other.cache()
    batch = make_batch([(live(rig)[0], 1)])
    mixed = dataclasses.replace(rig.cache, handle=theirs.handle)
    fails("spec.*max_slots", lambda: append(mixed, batch))
    nobody = dataclasses.replace(rig.cache, handle=jnp.asarray([10**6, 0], jnp.int32))
    if platform == "cuda":
        out = attend(nobody, batch)
        assert bool(jnp.all(jnp.isnan(out)))
        texts = []
        for pool in (rig.pool, other):  # whichever pool reports it, it is reported once
            with contextlib.suppress(*RUN_TIME_ERRORS):
                pool.extend([], [])
                continue
            texts.append("told")
        assert len(texts) <= 1
    else:
        fails("no pool|unknown|does not exist|1000000", lambda: append(nobody, batch))


def test_another_pools_cache_is_not_taken_for_ones_own(make_pool) -> None:
    """The slot taken by such an acquire is lost until a new generation; nothing else is."""
    spec = make_spec("fused")
    mine, other = make_pool(spec), make_pool(spec)
    slot, theirs = other.acquire(other.cache(), 10)
    fails("cache belongs to pool", lambda: mine.acquire(theirs, 1)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert mine.cache().lengths.tolist() == [-1] * spec.max_slots
    settle(kvp.advance(theirs, make_batch([(slot, 0)])))
