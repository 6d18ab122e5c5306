"""Programs of `test_replicas.py` on host calls, which run in a process with eight devices."""

from __future__ import annotations

import numpy as np
import pytest
from churning import Churn
from mesh_rig import check_written, make_spec, written
from replica_rig import check_shards_equal, make_pool, rows_of, write

import jax_kvpage as kvp
from jax_kvpage.events import BlockStored


def verbs(replicas: int, parts: int) -> None:
    """All verbs, with the pool's slot numbers, each slot with its own tokens."""
    with make_pool(replicas, parts, max_slots=6 * replicas) as pool:
        count = 2 * replicas
        slots, cache = pool.acquire(pool.cache(), [40] * count)
        # Replicas get slots in turns, equally many each.
        assert [pool.replica_of(slot) for slot in slots] == [*range(replicas)] * 2
        assert slots[:replicas] == [6 * r for r in range(replicas)]
        tokens = {slot: list(range(100 * i, 100 * i + 30 + i)) for i, slot in enumerate(slots)}
        cache = write(pool, cache, tokens)

        def check(cache: kvp.KVCache) -> None:
            lengths = {row.slot: row.length for row in pool.slot_table(cache)}
            assert lengths == {slot: len(ids) for slot, ids in tokens.items()}
            for slot, ids in tokens.items():
                assert pool.committed(slot) == ids
                got = written(cache, slot, len(ids))
                np.testing.assert_array_equal(got, np.repeat([ids], got.shape[1], 0).T)
            check_shards_equal(pool)

        check(cache)
        pool.extend(slots, 90)
        assert {row.reserved_tokens for row in pool.slot_table()} == {90}
        for slot in slots:
            more = [slot + i for i in range(40)]
            cache = write(pool, cache, {slot: more})
            tokens[slot] = tokens[slot] + more
        check(cache)

        donor = slots[-1]
        (fork,), cache = pool.fork(cache, donor, 1, 50)
        assert pool.replica_of(fork) == pool.replica_of(donor) == replicas - 1
        tokens[fork] = tokens[donor][:50]
        check(cache)
        owners = pool.block_map(fork, owners=True)[0]
        assert owners[0].slots == (donor, fork)
        assert owners[0].owner == donor
        # Beams on two replicas: children stay on their parents' replica.
        beams, cache = pool.reorder(cache, [slots[0], fork], [1, 0])
        assert beams == [fork, slots[0]]
        beams, cache = pool.reorder(cache, [slots[0], fork], [0, 0])
        assert [pool.replica_of(beam) for beam in beams] == [0, 0]
        del tokens[fork]
        tokens[beams[1]] = tokens[slots[0]]
        pool.check(cache)
        check(cache)

        cut = [slots[0], donor]
        cache = pool.truncate(cache, cut, [20, 33])
        for slot, length in zip(cut, (20, 33), strict=True):
            tokens[slot] = tokens[slot][:length]
        check(cache)
        cache = kvp.set_lengths(cache, [slots[1], -1], [len(tokens[slots[1]]), 0])
        cache = pool.drop_before(cache, [slots[1]], 40)
        pool.check(cache)
        dropped = {row.slot: row.dropped_tokens for row in pool.slot_table()}
        assert dropped[slots[1]] == 32
        assert sum(dropped.values()) == 32

        cache = pool.release(cache, list(tokens))
        pool.check(cache)
        stats = pool.stats()
        assert stats.slots_occupied == stats.slots_draining == stats.blocks_mapped == 0
        assert pool.trim() > 0
        assert pool.stats().blocks_parked == 0
        check_shards_equal(pool)


def prefixes(replicas: int, parts: int) -> None:
    """A request goes to the replica with its prefix, unless that is full or too loaded."""
    one, two = (np.arange(begin, begin + 100, dtype=np.int32) for begin in (1, 501))
    with make_pool(replicas, parts, max_slots=3 * replicas) as pool:
        (a, b), found, cache = pool.acquire_prefix(pool.cache(), [one, two])
        assert found == [0, 0]
        assert [pool.replica_of(slot) for slot in (a, b)] == [0, 1]
        cache = write(pool, cache, {a: one.tolist(), b: two.tolist()})
        cache = pool.release(cache, [a, b])
        pool.check(cache)
        assert pool.find_prefix(one) == pool.find_prefix(two) == 99
        stored = [[e for e in each if isinstance(e, BlockStored)] for each in pool.replica_events()]
        assert [len(each) for each in stored] == [1, 1, *[0] * (replicas - 2)]
        with pytest.raises(ValueError, match=r"replica_events\(\)"):
            pool.events()

        # The prefixes are on two replicas; requests in any order find them.
        (c, d), found, cache = pool.acquire_prefix(cache, [[*two, 7], [*one, 8, 9]])
        assert found == [100, 100]
        assert [pool.replica_of(slot) for slot in (c, d)] == [1, 0]
        cache = write(pool, cache, {c: [7], d: [8, 9]})
        np.testing.assert_array_equal(written(cache, c, 101)[:, 0], [*two, 7])
        np.testing.assert_array_equal(written(cache, d, 102)[:, 0], [*one, 8, 9])

        # 64 cached tokens are worth less than a replica without load.
        ids = [*two[:64].tolist(), *range(2000, 2100)]
        slot, found, cache = pool.acquire_prefix(cache, ids)
        assert (found, pool.replica_of(slot)) == ((0, 2) if replicas > 2 else (64, 1))
        cache = write(pool, cache, {slot: ids[found:]})
        cache = pool.release(cache, [c, d, slot])
        pool.check(cache)
        check_shards_equal(pool)

        # The second of two requests with the same beginning waits for the first, on its replica.
        new = list(range(3000, 3080))
        others = [[5 + i] for i in range(replicas - 1)]
        result = pool.acquire_prefix(cache, [*others, [*new, 1], [*new, 2]])
        (*rest, first, none), found, cache = result
        assert (none, result.wait_for) == (None, [*[None] * replicas, replicas - 1])
        assert {pool.replica_of(slot) for slot in [first, *rest]} == set(range(replicas))
        cache = write(pool, cache, {first: [*new, 1], **dict(zip(rest, others, strict=True))})
        slot, found, cache = pool.acquire_prefix(cache, [*new, 2])
        assert (found, pool.replica_of(slot)) == (80, pool.replica_of(first))
        pool.check(pool.release(cache, [first, *rest, slot]))

        # If the replica with the prefix has no slot left, the request goes elsewhere and is
        # recomputed.
        cache = pool.cache()
        taken, cache = pool.acquire(cache, [16] * (3 * replicas))
        assert sorted(taken) == list(range(3 * replicas))
        assert not pool.can_acquire(1)
        with pytest.raises(kvp.OutOfSlots, match=r"replicas of 3 slots.*acquire_prefix"):
            pool.acquire_prefix(cache, one)
        cache = pool.release(cache, taken[1])
        pool.check(cache)
        assert pool.can_acquire(1)
        slot, found, cache = pool.acquire_prefix(cache, [*one, 7])
        assert (slot, found) == (taken[1], 0)
        pool.check(pool.release(cache, [slot, taken[0], *taken[2:]]))

        # Pins, hints and eviction reach every replica.
        cache = pool.cache()
        (a, b), found, cache = pool.acquire_prefix(cache, [[*new, 3], list(range(4000, 4070))])
        assert found[1] == 0
        cache = write(pool, cache, {a: [*new, 3][found[0] :], b: list(range(4000, 4070))})
        pool.check(pool.release(cache, [a, b]))
        assert pool.pin(new[:64], max_share=0.9) == 64
        pool.hint(range(4000, 4070), "drop")
        assert pool.evict() > 0
        assert (pool.find_prefix(new), pool.find_prefix(range(4000, 4070))) == (64, 0)
        pool.unpin(new[:64])
        assert pool.evict() > 0
        assert pool.find_prefix(new) == 0
        check_shards_equal(pool)


def out_of_blocks(replicas: int, parts: int) -> None:
    """Too little memory on all replicas raises OutOfBlocks and changes nothing."""
    token_bytes = make_spec(4).token_bytes
    size = replicas * 8 * 32 * token_bytes
    with make_pool(replicas, parts, max_slots=4 * replicas, capacity=size) as pool:
        assert pool.stats().blocks_total == 8 * replicas
        slots, cache = pool.acquire(pool.cache(), [200] * replicas)  # 7 blocks each
        before = rows_of(pool)
        assert not pool.can_acquire(64)
        assert pool.can_acquire([32] * replicas)
        assert not pool.can_acquire([32] * (replicas + 1))
        for wanted in (64, [32, 64], [32] * (replicas + 1)):
            with pytest.raises(kvp.OutOfBlocks, match=r"replicas.*came closest") as raised:
                pool.acquire(cache, wanted)
            assert raised.value.wanted > raised.value.free
            assert rows_of(pool) == before
        assert pool.can_acquire([32] * replicas)
        more, cache = pool.acquire(cache, [32] * replicas)
        with pytest.raises(kvp.OutOfBlocks):
            pool.extend([slots[1], slots[0]], [224, 225])
        assert {row.reserved_tokens for row in pool.slot_table()} == {200, 32}
        cache = pool.release(cache, [slots[1], more[1]])
        slot, cache = pool.acquire(cache, 250, wait=True)
        assert pool.replica_of(slot) == pool.replica_of(slots[1])
        pool.check(pool.release(cache, [row.slot for row in pool.slot_table() if not row.draining]))


def memory(replicas: int, parts: int) -> None:
    """Each device has the memory of its heads and its replica's slots; stats are sums."""
    tokens = 64
    with make_pool(replicas, parts, max_slots=2 * replicas) as pool:
        slots, cache = pool.acquire(pool.cache(), [tokens] * (replicas + 1))
        cache = write(pool, cache, {slot: range(tokens) for slot in slots})
        pool.check(cache)
        stats, each = pool.stats(), pool.replica_stats()
        assert stats.mapped == (replicas + 1) * tokens * pool.spec.token_bytes
        own = [sum(pool.replica_of(slot) == r for slot in slots) for r in range(replicas)]
        assert own == [2, *[1] * (replicas - 1)]
        for one, count in zip(each, own, strict=True):
            assert one.mapped == one.physical == count * tokens * pool.spec.token_bytes
            assert one.slots_occupied == count
        names = ("capacity", "mapped", "free", "physical", "slots_occupied", "blocks_total")
        for name in names:
            assert getattr(stats, name) == sum(getattr(one, name) for one in each), name
        assert stats.reserved_virtual == sum(one.reserved_virtual for one in each)
        for i, shard in enumerate(pool._pool.shards):
            assert pool.sharding is not None
            wanted = own[i // parts] * tokens * pool.spec.token_bytes // parts
            assert shard.numbers().physical_bytes == wanted
            assert cache.lengths.addressable_shards[i].data.shape == (2,)
        assert [row.bytes for row in pool.slot_table()] == [tokens * pool.spec.token_bytes] * len(
            slots
        )
        pool.resize(stats.capacity // 2)
        assert [one.blocks_total for one in pool.replica_stats()] == [32] * replicas
        with pytest.raises(kvp.OutOfBlocks):
            pool.resize(replicas * 3 * stats.block_bytes)  # the first replica uses 4
        assert [one.blocks_total for one in pool.replica_stats()] == [32] * replicas
        pool.check(pool.release(cache, slots))


class _OnReplicas(Churn):
    """Sequences of all replicas grow in one step."""

    def grow(self, slot: int, ids: list[int]) -> None:
        grown = [one for one in self.live if len(self.live[one]) < 200]
        ids = ids[: self.unit]
        self.pool.extend(grown, [len(self.live[one]) + len(ids) for one in grown])
        self.cache = write(self.pool, self.cache, dict.fromkeys(grown, ids))
        self.live |= {one: self.live[one] + ids for one in grown}


def churn(replicas: int, parts: int, steps: int) -> None:
    """Devices of a replica never disagree, and tokens are kept."""
    size = replicas * 32 * 32 * make_spec(4).token_bytes
    with make_pool(replicas, parts, max_slots=4 * replicas, capacity=size) as pool:
        requests = _OnReplicas(
            pool, replicas, write=write, check=check_written, audit=check_shards_equal
        )
        requests.run(steps)
        requests.end_all()
