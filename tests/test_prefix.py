"""acquire_prefix: what is found, how a request gets it, and what that costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from prefix_rig import BLOCK, DIM, HEADS, LAYERS, PrefixRig, spec_of, text

import jax_kvpage as kvp


def rig_of(make_pool, spec: kvp.CacheSpec, blocks: int, **options: object) -> PrefixRig:
    resolved = spec.resolve("cpu")
    ranges = resolved.slot_bytes // (resolved.block_bytes * -(-spec.max_seq_len // BLOCK))
    pool = make_pool(spec, resolved.block_bytes * blocks * ranges, **options)
    return PrefixRig(pool)


@pytest.fixture
def rig(make_pool, layout: str) -> PrefixRig:
    return rig_of(make_pool, spec_of(layout), 64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_a_running_sequence_is_found(make_pool, layout: str, dtype) -> None:
    rig = rig_of(make_pool, spec_of(layout, dtype), 64)
    ids = text(70)
    first, cached = rig.acquire(ids)
    assert cached == 0
    second, cached = rig.acquire(ids[:60] + text(9, 1))
    assert cached == 60
    rig.check()
    shared = rig.pool.stats().blocks_shared
    assert shared == 60 // BLOCK * len(rig.pool.block_map(first))
    rig.write(first, text(5, 2))
    rig.write(second, text(5, 3))
    rig.check()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_a_released_sequence_is_found(make_pool, layout: str, dtype) -> None:
    """Full blocks are mapped, the tokens of the last one are copied, and the donor's slot stays."""
    rig = rig_of(make_pool, spec_of(layout, dtype), 64)
    ids = text(70)
    first, _ = rig.acquire(ids)
    rig.write(first, text(30, 9))
    rig.release(first)
    second, cached = rig.acquire(ids[:60] + text(9, 1))
    assert (second != first, cached) == (True, 60)
    rig.check()
    third, cached = rig.acquire(ids + text(30, 9) + text(3, 4))
    assert (third, cached) == (first, 100), "the conversation goes on in its slot"
    rig.check()


def test_blocks_that_a_running_sequence_continues_make_room(make_pool) -> None:
    """Two sequences have computed the same tokens, and the first one's blocks are parked."""
    spec = spec_of("fused").resolve("cpu")
    pool = make_pool(spec, 8 * spec.block_bytes)
    ids = text(96)
    first, cached, cache = pool.acquire_prefix(pool.cache(), ids[:48])
    second, cached_too, cache = pool.acquire_prefix(cache, ids[:48])
    assert (cached, cached_too) == (0, 0)

    def write(slot: int, begin: int, end: int) -> None:
        nonlocal cache
        x = jnp.ones((end - begin, HEADS, DIM))
        batch = kvp.Batch.from_lengths([slot], [end - begin])
        for layer in range(LAYERS):
            cache = kvp.append_kv(cache, x, x, batch, layer=layer)
        cache = kvp.advance(cache, batch)
        pool.commit(slot, ids[begin:end])

    write(first, 0, 48)
    jax.block_until_ready(cache)
    assert pool.find_prefix([*ids[:48], 1]) == 48
    write(second, 0, 48)
    cache = pool.release(cache, first)
    pool.check(cache)
    pool.extend(second, 64)
    write(second, 48, 64)
    stats = pool.stats()
    assert (stats.blocks_mapped, stats.blocks_parked, stats.blocks_free) == (4, 3, 1)
    pool.extend(second, 96)
    write(second, 64, 96)
    pool.check(cache)
    assert pool.find_prefix([*ids, 1]) == 96
    cache = pool.release(cache, second)


def test_a_second_turn_and_a_repeated_prompt_cost_no_system_call(rig) -> None:
    ids = text(100)
    slot, _ = rig.acquire(ids, num_tokens=200)
    rig.write(slot, text(20, 1))
    rig.release(slot)
    calls = rig.pool.stats().system_calls
    again, cached = rig.acquire(ids, num_tokens=200)
    assert (again, cached) == (slot, 99)
    rig.write(again, text(30, 2))
    rig.release(again)
    turn, cached = rig.acquire(ids + text(30, 2) + text(10, 3), num_tokens=200)
    assert (turn, cached) == (slot, 130)
    assert rig.pool.stats().system_calls == calls
    rig.check()


def test_a_system_prompt_does_not_destroy_conversations(rig) -> None:
    system = text(50)
    talk = system + text(60, 1)
    slot, _ = rig.acquire(talk)
    rig.release(slot)
    other, cached = rig.acquire(system)
    assert (other != slot, cached) == (True, 49)
    rig.release(other)
    again, cached = rig.acquire(talk + text(5, 2))
    assert (again, cached) == (slot, 110)
    rig.check()


def test_the_last_token_is_found_only_if_asked_for(rig) -> None:
    ids = text(64)
    rig.acquire(ids)
    assert rig.acquire(ids)[1] == 63
    assert rig.acquire(ids, whole=True)[1] == 64
    assert rig.acquire(ids, match_unit=BLOCK)[1] == 48
    assert rig.acquire(ids[:20] + text(9, 1), min_cached=21)[1] == 0
    rig.check()


def test_namespaces_never_share(rig) -> None:
    ids = text(40)
    rig.acquire(ids)
    assert rig.acquire(ids, namespace="")[1] == 0
    assert rig.acquire(ids, namespace="adapter")[1] == 0
    assert rig.acquire(ids, namespace="adapter")[1] == 39


def test_sequences_of_acquire_are_not_found(rig) -> None:
    slot, rig.cache = rig.pool.acquire(rig.cache, 40)
    rig.ids[slot] = []
    rig.write(slot, text(40))
    assert rig.acquire(text(40))[1] == 0


def test_requests_with_a_new_prefix_in_common_wait_for_the_first(rig) -> None:
    prefix = text(40)
    prompts = [prefix + text(5, seed) for seed in range(1, 5)] + [text(8, 9)]
    got = rig.pool.acquire_prefix(rig.cache, prompts)
    slots, cached, rig.cache = got
    assert [slot is None for slot in slots] == [False, True, True, True, False]
    assert got.wait_for == [None, 0, 0, 0, None]
    assert cached == [0] * 5
    for slot, ids in zip(slots, prompts, strict=True):
        if slot is not None:
            rig.ids[slot] = []
            rig.write(slot, ids)
    slots, cached, rig.cache = rig.pool.acquire_prefix(rig.cache, prompts[1:4])
    assert cached == [40, 40, 40]
    for slot, ids in zip(slots, prompts[1:4], strict=True):
        rig.ids[slot] = ids[:40]
        rig.write(slot, ids[40:])
    rig.check()


def test_blocks_are_those_of_one_prefix_and_tails(make_pool, layout: str) -> None:
    """32 requests share 2048 tokens: they take one prefix and 32 tails, and not one block more."""
    spec = spec_of(layout, max_slots=40, max_seq_len=4096)
    rig = rig_of(make_pool, spec, 400)
    prefix = text(2048)
    found = [rig.acquire(prefix + text(10, 1 + i)) for i in range(32)]
    assert [cached for _, cached in found] == [0] + [2048] * 31
    ranges = len(rig.pool.block_map(found[0][0]))
    stats = rig.pool.stats()
    assert stats.blocks_mapped == (2048 // BLOCK + 32) * ranges
    assert stats.blocks_shared == 2048 // BLOCK * ranges
    rig.check()


def test_memory_comes_from_what_is_cached_when_it_is_needed(make_pool, layout: str) -> None:
    rig = rig_of(make_pool, spec_of(layout), 24, poison=True)
    prompts = [text(60, seed) for seed in range(5)]
    for ids in prompts:
        slot, cached = rig.acquire(ids)
        assert cached == 0
        rig.release(slot)
    stats = rig.pool.stats()
    assert stats.blocks_cached == stats.blocks_parked > 0
    big, cached = rig.acquire(text(200, 7))  # takes 13 of 24 blocks, 20 of which are cached
    rig.check()
    assert rig.pool.stats().prefix_evictions >= 9
    assert rig.acquire(prompts[-1])[1] >= 48, "the newest is what stays, but for its partial block"
    with pytest.raises(kvp.OutOfBlocks):
        rig.acquire(text(400, 8))
    rig.check()
    rig.release(big)
    assert rig.acquire(text(300, 8))[1] == 0
    rig.check()


def test_extend_and_map_slots_evict_too(make_pool, layout: str) -> None:
    rig = rig_of(make_pool, spec_of(layout), 16)
    slot, _ = rig.acquire(text(100))
    rig.release(slot)
    live, _ = rig.acquire(text(16, 1))
    rig.pool.extend(live, 160)
    rig.write(live, text(100, 2))
    rig.release(live)
    live, _ = rig.acquire(text(16, 3))
    rig.cache, ok = jax.jit(kvp.map_slots)(rig.cache, jnp.asarray([live]), jnp.asarray([250]))
    assert bool(ok[0])
    rig.write(live, text(200, 4))
    rig.check()


def test_trim_and_resize_spare_what_is_cached(rig) -> None:
    ids = text(100)
    slot, _ = rig.acquire(ids, num_tokens=300)
    rig.release(slot)
    rig.pool.trim()
    stats = rig.pool.stats()
    assert stats.blocks_parked == stats.blocks_cached > 0
    assert rig.acquire(ids)[1] == 99
    rig.release(*rig.ids)
    rig.pool.resize(stats.block_bytes * stats.blocks_cached // 2)  # less than what is cached
    assert 0 < rig.acquire(ids[:40])[1] < 40


def test_truncation_cuts_what_is_found(rig) -> None:
    ids = text(100)
    slot, _ = rig.acquire(ids)
    assert rig.acquire(ids[:90] + text(4, 1))[1] == 90
    rig.cache = rig.pool.truncate(rig.cache, slot, 40)
    rig.ids[slot] = ids[:40]
    rig.write(slot, text(50, 2))
    rig.check()
    assert rig.acquire(ids)[1] >= 90 // BLOCK * BLOCK, "the fork still has it"
    assert rig.acquire(ids[:40] + text(50, 2) + [1])[1] == 90
    rig.check()


def test_a_new_generation_keeps_what_is_written(rig) -> None:
    ids = text(100)
    parked, _ = rig.acquire(ids)
    rig.release(parked)
    live, _ = rig.acquire(text(50, 1))
    rig.cache = rig.pool.cache()
    assert rig.acquire(ids)[1] == 99
    assert rig.acquire(text(50, 1))[1] == 49
    rig.check()
    rig.write(live, text(9, 2))
    rig.check()


def test_tokens_of_a_failed_program_are_not_found(rig) -> None:
    ids = text(64)
    slot, rig.cache = rig.pool.acquire_prefix(rig.cache, ids)[::2]
    rig.pool.commit(slot, ids)  # but never written
    with pytest.raises(Exception, match="acquire_prefix"):
        rig.pool.check(rig.pool.acquire_prefix(rig.cache, ids)[2])
    rig.cache = rig.pool.cache()
    assert rig.acquire(ids)[1] == 0
    rig.check()


def test_a_request_that_is_not_queued_leaves_the_pool_as_it_was(rig, monkeypatch) -> None:
    ids = text(70)
    slot, _ = rig.acquire(ids)
    rig.release(slot)
    before = rig.pool.stats()

    def fail(*args: object) -> None:
        raise RuntimeError("not queued")

    with monkeypatch.context() as patch:
        patch.setattr(rig.pool._queue, "run", fail)
        for known in (ids[:50], ids):
            for tail in ([], [1], text(5, 1)):
                with pytest.raises(RuntimeError):
                    rig.pool.acquire_prefix(rig.cache, known + tail)
    after = rig.pool.stats()
    assert (after.slots_occupied, after.blocks_cached) == (0, before.blocks_cached)
    assert rig.acquire([*ids, 5])[1] == 70
    rig.check()


def test_mistakes(rig) -> None:
    with pytest.raises(ValueError, match="2147483647"):
        rig.pool.acquire_prefix(rig.cache, [2**31])
    with pytest.raises(ValueError, match="token_ids"):
        rig.pool.acquire_prefix(rig.cache, 7)
    with pytest.raises(ValueError, match="hint: session: wanted the ids of one sequence"):
        rig.pool.hint([[1], [2]], "drop")
    with pytest.raises(ValueError, match="namespace"):
        rig.pool.acquire_prefix(rig.cache, [7], namespace=3)
    with pytest.raises(ValueError, match="512"):
        rig.pool.acquire_prefix(rig.cache, text(513))
    with pytest.raises(ValueError, match="num_tokens"):
        rig.pool.acquire_prefix(rig.cache, [[1], [2]], [1])
    with pytest.raises(ValueError, match="match_unit"):
        rig.pool.acquire_prefix(rig.cache, [1], match_unit=0)
    assert rig.pool.stats().slots_occupied == 0


def test_find_pin_hint_and_evict(make_pool, layout: str) -> None:
    rig = rig_of(make_pool, spec_of(layout), 24)
    system, other, dropped = text(64), text(64, 1), text(64, 2)
    for ids in (system, other, dropped):
        rig.release(rig.acquire(ids)[0])
    assert rig.pool.find_prefix(system) == 63
    assert rig.pool.find_prefix(system, whole=True) == 64
    assert rig.pool.find_prefix(system, "else") == 0
    assert rig.pool.pin(system, max_share=0.1) == 32, "2 of 24 blocks"
    rig.pool.unpin(system)
    assert rig.pool.pin(system) == 64
    rig.pool.hint(dropped, "drop")
    block = rig.pool.spec.block_bytes
    assert rig.pool.evict(block) >= block
    assert rig.pool.find_prefix(dropped) < 63
    assert rig.pool.find_prefix(other) == 63
    assert rig.pool.evict() > 0
    assert rig.pool.find_prefix(other) == 0
    assert rig.pool.find_prefix(system) == 63, "pinned"
    big, _ = rig.acquire(text(310, 3))
    with pytest.raises(kvp.OutOfBlocks):
        rig.pool.extend(big, 330)
    rig.pool.unpin(system)
    rig.pool.extend(big, 330)
    assert rig.pool.find_prefix(system) < 63
    rig.check()


def test_a_pin_ends_with_its_time(rig) -> None:
    ids = text(64)
    rig.release(rig.acquire(ids)[0])
    assert rig.pool.pin(ids, ttl=0) == 64
    assert rig.pool.evict() > 0
    assert rig.pool.find_prefix(ids) == 0
