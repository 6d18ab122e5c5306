"""can_acquire predicts what acquire does, and asking changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from harness import busy
from pool_checks import check_totals, count_blocks, drained, make_spec

import jax_kvpage as kvp


def _state(pool: kvp.KVPool) -> tuple:
    rows = pool.slot_table()
    return pool.stats(), rows, [pool.block_map(row.slot) for row in rows]


def _ask(pool: kvp.KVPool, wanted: int | list[int]) -> bool:
    before = _state(pool)
    answer = pool.can_acquire(wanted)
    assert type(answer) is bool
    assert _state(pool) == before
    return answer


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("seed", range(3))
def test_the_answer_is_what_acquire_does(layout: str, seed: int, make_pool) -> None:
    rng = np.random.default_rng(seed)
    spec = make_spec(layout).resolve("cpu")
    blocks = count_blocks(spec, 16 * 20)
    pool = make_pool(spec, blocks * spec.block_bytes)
    cache, live = pool.cache(), []
    answers = []
    for _ in range(150):
        wanted = rng.integers(0, 200, size=rng.integers(1, 4)).tolist()
        wanted = wanted[0] if len(wanted) == 1 else wanted
        answer = _ask(pool, wanted)
        answers.append(answer)
        try:
            slots, cache = pool.acquire(cache, wanted)
        except (kvp.OutOfBlocks, kvp.OutOfSlots):
            assert not answer
        else:
            assert answer
            live += [slots] if isinstance(slots, int) else slots
        kind = rng.integers(0, 6)
        if kind < 4 and live:
            cache = drained(pool.release(cache, live.pop(rng.integers(len(live)))))
        elif kind == 4:
            pool.trim()
        check_totals(pool)
    assert 20 < sum(answers) < 130


def test_draining_slots_do_not_count(make_pool) -> None:
    spec = make_spec().resolve("cpu")
    pool = make_pool(spec, 20 * spec.block_bytes)
    slot, cache = pool.acquire(pool.cache(), 16 * 15)
    assert _ask(pool, 16 * 5)
    assert not _ask(pool, 16 * 6)
    cache = pool.release(kvp.after(cache, busy(1)), slot)
    assert not pool.can_acquire(16 * 6)
    drained(cache)
    assert _ask(pool, 16 * 20)
    assert not _ask(pool, [16 * 10, 16 * 11])
    assert _ask(pool, [16 * 10, 16 * 10])
    assert _ask(pool, [0] * 6)
    assert not _ask(pool, [0] * 7)  # not enough slots
    assert _ask(pool, [])


def test_refused(make_pool) -> None:
    pool = make_pool(make_spec())
    for wrong, message in (
        (-1, r"can_acquire: num_tokens is -1, wanted 0\.\.512"),
        ([5, 513], r"can_acquire: num_tokens is 513, wanted 0\.\.512"),
        (2**40, "can_acquire: num_tokens.*1099511627776"),
        ("many", "can_acquire: num_tokens: wanted an int"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.can_acquire(wrong)
    pool.close()
    with pytest.raises(kvp.PoolClosed, match="can_acquire"):
        pool.can_acquire(1)
