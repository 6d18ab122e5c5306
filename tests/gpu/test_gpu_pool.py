"""Pools on a GPU: the CPU's tests of host calls, transforms and batching, and a state machine."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from pool_checks import count_blocks, make_spec
from test_batching import one as one
from test_batching import setup as setup
from test_batching import (
    test_append_advance_and_attend as test_append_advance_and_attend,
)
from test_batching import test_map_slots_and_set_lengths as test_map_slots_and_set_lengths
from test_batching import test_nested_vmap as test_nested_vmap
from test_batching import (
    test_readers_map_over_what_does_not_fold as test_readers_map_over_what_does_not_fold,
)
from test_batching import test_tables as test_tables_batched
from test_batching import test_update_and_attend as test_update_and_attend
from test_pool import (
    test_a_list_is_acquired_whole_or_not_at_all as test_a_list_is_acquired_whole_or_not_at_all,
)
from test_pool import test_a_new_pool_is_empty as test_a_new_pool_is_empty
from test_pool import (
    test_acquire_maps_what_the_tokens_need as test_acquire_maps_what_the_tokens_need,
)
from test_pool import test_acquire_takes_lists as test_acquire_takes_lists
from test_pool import test_block_map_names_every_block_once as test_block_map_names_every_block_once
from test_pool import test_commit_and_slot_table as test_commit_and_slot_table
from test_pool import (
    test_extend_keeps_the_mapping_while_there_is_room as test_extend_keeps_the_mapping,
)
from test_pool import (
    test_free_and_invalid_slots_on_the_host as test_free_and_invalid_slots_on_the_host,
)
from test_pool import test_release_parks_and_acquire_adopts as test_release_parks_and_acquire_adopts
from test_pool import test_tails_are_stolen_only_under_pressure as test_tails_are_stolen
from test_pool import test_the_best_fitting_parked_slot_is_adopted as test_best_fitting_parked_slot
from test_pool_capacity import (
    test_acquire_waits_for_draining_blocks as test_acquire_waits_for_draining_blocks,
)
from test_pool_capacity import test_draining_is_not_handed_out as test_draining_is_not_handed_out
from test_pool_capacity import (
    test_map_slots_maps_inside_a_program as test_map_slots_maps_inside_a_program,
)
from test_pool_capacity import test_no_slot_left as test_no_slot_left
from test_pool_capacity import test_out_of_blocks_carries_the_numbers as test_out_of_blocks
from test_pool_capacity import test_peak as test_peak
from test_pool_capacity import test_resize as test_resize
from test_pool_capacity import test_resized_pool_keeps_its_data as test_resized_pool_keeps_its_data
from test_pool_capacity import test_trim_gives_memory_back as test_trim_gives_memory_back
from test_pool_state_machine import PoolMachine
from test_quantized import test_error_against_float32 as test_error_against_float32
from test_quantized import (
    test_not_finite_tokens_show_where_they_are_seen as test_not_finite_tokens,
)
from test_threads_fork_exit import (
    test_host_calls_beside_running_steps as test_host_calls_beside_running_steps,
)
from test_threads_fork_exit import test_two_pools_in_two_threads as test_two_pools_in_two_threads

import jax_kvpage as kvp

__all__ = [
    "test_best_fitting_parked_slot",
    "test_extend_keeps_the_mapping",
    "test_not_finite_tokens",
    "test_out_of_blocks",
    "test_tables_batched",
    "test_tails_are_stolen",
]

pytestmark = pytest.mark.gpu


@pytest.fixture
def pool(make_pool, platform: str) -> kvp.KVPool:
    """20 blocks of 16 tokens; only the fused layout can pad them to the mapping granularity."""
    spec = make_spec("fused").resolve(platform)
    return make_pool(spec, count_blocks(spec, 16 * 20) * spec.block_bytes)


@pytest.fixture(params=["fused", "per_layer"])
def default_pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    """Default blocks of the platform: 2048 or 8192 tokens if blocks have 2 MiB."""
    return make_pool(kvp.CacheSpec(2, 2, 64, 4, 20000, jnp.bfloat16, request.param), "256MiB")


def test_default_blocks_are_whole_granules(default_pool: kvp.KVPool, platform: str) -> None:
    spec = default_pool.spec
    assert spec.blocks_per_range > 1
    slot, cache = default_pool.acquire(default_pool.cache(), 1)
    assert spec.block_bytes % (2 * 2**20 if platform == "cuda" else 4096) == 0
    stats = default_pool.stats()
    assert stats.blocks_mapped == spec.num_ranges
    assert stats.physical >= stats.mapped == spec.num_ranges * spec.block_bytes
    calls = stats.system_calls
    default_pool.extend(slot, spec.block_tokens)
    assert default_pool.stats().system_calls == calls
    default_pool.extend(slot, spec.block_tokens + 1)
    assert default_pool.stats().system_calls > calls
    assert default_pool.stats().blocks_mapped == 2 * spec.num_ranges
    default_pool.check(cache)


def test_against_a_model(platform: str) -> None:
    """Random operations: no block is lost, leaked or owned twice, and no data is mixed up."""

    class Machine(PoolMachine):
        pass

    Machine.platform = platform
    run_state_machine_as_test(Machine, settings=settings(max_examples=12, stateful_step_count=25))
