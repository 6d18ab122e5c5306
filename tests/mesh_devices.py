"""Programs of `test_mesh_devices.py`: pools with mirrors, each on a different device of the fake
driver, called as one pool. No programs run there; their effect on the tables is simulated.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mesh_rig import COLLECTIVES, HEAD_DIM, HEADS, make_mesh, make_pool, make_spec, place, random

import jax_kvpage as kvp
from jax_kvpage import _native
from jax_kvpage._cuda import Place
from jax_kvpage.ops.edit_slots import VACATE
from jax_kvpage.sharding.devices import total_bytes
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.shards import ShardedDecision, ShardedPool

fake: Any = _native.fake_driver
devices: Any = _native.fake_devices

OUT_OF_MEMORY, UNKNOWN = 2, 999


class Rig:
    """A pool over several devices, and the programs that its host calls would queue.

    Args:
        size: Number of devices.
        blocks: Number of blocks of 32 tokens on each.
    """

    def __init__(self, size: int, blocks: int = 16) -> None:
        self.spec = make_spec(2, max_slots=6).resolve("cpu")
        self.shards = [
            _native.Pool(
                *(self.spec.as_ints(), self.spec.block_bytes, blocks * self.spec.block_bytes),
                *(False, False, False, "fake_cuda", device),
            )
            for device in range(size)
        ]
        self.pool = ShardedPool(self.shards, mirrored=True)
        self.pool.new_generation()

    def decided(self, call: Callable[[ShardedDecision], Any]) -> Any:
        """Returns the result of a call with a decision, as `Queue` makes it; None if it fails."""
        decision = ShardedDecision(len(self.shards))
        try:
            claim = call(decision)
        except _native.StatusError:
            self.pool.undo(decision)
            return None
        if getattr(claim, "ok", True):
            return decision.edits if claim is None else claim
        self.pool.undo(decision)
        return None

    def play(self, slot: int, tokens: int) -> None:
        for device, shard in enumerate(self.shards):
            devices.play(device, shard.id, slot, tokens)

    def acquire(self, tokens: int, ids: Sequence[int] = ()) -> int:
        """Acquires a slot and writes and commits these tokens."""
        claim = self.decided(lambda decision: self.pool.acquire(decision, [tokens]))
        (slot,) = claim.slots
        self.play(slot, len(ids))
        self.pool.commit(slot, list(ids))
        return int(slot)

    def release(self, slot: int) -> None:
        edits = [(VACATE, slot, 0, -1)]
        assert self.decided(lambda decision: self.pool.start_edits(decision, "release", edits))
        self.play(slot, -1)

    def look(self, device: int) -> Any:
        """Returns what a device's pool and table hold for the occupied slots, and its block
        counts.
        """
        shard = self.shards[device]
        shard.audit()
        table = devices.rows(device, shard.id)
        rows = [row for row in shard.rows() if not row.draining]
        for row in rows:
            assert table[row.slot][0] <= 32 * row.blocks, "programs may write what is not mapped"
        numbers = shard.numbers()
        return (
            [
                (r.slot, r.reserved, r.committed, table[r.slot], shard.block_map(r.slot))
                for r in rows
            ],
            (numbers.blocks_total, numbers.blocks_free + numbers.blocks_parked),
        )

    def looks(self, maps: bool = True) -> Any:
        """Returns the same for all devices, which must agree; without `maps`, block maps may
        differ.
        """
        each = [self.look(device) for device in range(len(self.shards))]
        if not maps:
            each = [([row[:4] for row in rows], numbers) for rows, numbers in each]
        assert all(one == each[0] for one in each), each
        return each[0]

    def close(self) -> None:
        self.pool.close()
        self.shards.clear()
        self.pool.shards.clear()


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    devices.close()
    counts, violation = fake.report()
    assert not any(counts.values()), (counts, violation)


def _fork(rig: Rig, requests: Any, released: Any = ()) -> Any:
    return rig.decided(lambda decision: rig.pool.fork(decision, "fork", requests, released))


def _prefix(rig: Rig, ids: Sequence[int], room: int) -> Any:
    def call(decision: ShardedDecision) -> Any:
        wanted = [np.asarray(ids, np.int32)], [room]
        return rig.pool.acquire_prefix(decision, *wanted, "", False, 1, 0)

    return rig.decided(call)


def _called(call: Callable[[], Any]) -> Any:
    """Returns the result of a call without a decision; None if it fails."""
    with contextlib.suppress(_native.StatusError):
        result = call()
        return result if getattr(result, "ok", True) else None
    return None


def _block(rig: Rig, count: int) -> int:
    return count * rig.spec.block_bytes * len(rig.shards)


# Host calls, made while slot a (room for 40 tokens, 35 written), slot b (a fork of a's first 33
# tokens) and a third slot are occupied, and a slot with 5 blocks is parked. 6 of 16 blocks are
# free.
_CALLS: dict[str, Callable[[Rig, int, int], Any]] = {
    "acquire": lambda rig, a, b: rig.decided(lambda d: rig.pool.acquire(d, [150, 20])),
    "adopt": lambda rig, a, b: rig.decided(lambda d: rig.pool.acquire(d, [250])),
    "extend": lambda rig, a, b: _called(lambda: rig.pool.extend([a, b], [120, 90])),
    "steal": lambda rig, a, b: _called(lambda: rig.pool.extend([a, b], [256, 224])),
    "fork": lambda rig, a, b: _fork(rig, [(a, 35), (b, -1)]),
    "reorder": lambda rig, a, b: _fork(rig, [(a, -1)], [b]),
    "truncate": lambda rig, a, b: rig.decided(lambda d: rig.pool.truncate(d, [a], [34])),
    "separate": lambda rig, a, b: rig.decided(lambda d: rig.pool.truncate(d, [a], [9])),
    "prefix": lambda rig, a, b: _prefix(rig, [*range(500, 540), 7, 8], 100),
    "release": lambda rig, a, b: rig.decided(
        lambda d: rig.pool.start_edits(d, "release", [(VACATE, a, 0, -1)])
    ),
    "trim": lambda rig, a, b: _called(rig.pool.trim),
    "shrink": lambda rig, a, b: _called(lambda: rig.pool.resize(_block(rig, 5))),
    "grow": lambda rig, a, b: _called(lambda: rig.pool.resize(_block(rig, 30))),
}
# Calls that make no driver call that could fail.
_QUIET = ("truncate", "release", "grow")
# Calls that may keep their effects up to a failure, since nobody needs what was there: memory that
# was given back, private copies of shared blocks.
_PARTLY = ("trim", "separate")


def _life(name: str, size: int, at: int, code: int) -> tuple[bool, bool]:
    """Runs one operation whose `at`-th driver call fails; returns whether there was such a call,
    and whether the operation failed.
    """
    rig = Rig(size)
    a = rig.acquire(40, range(35))
    (b,) = _fork(rig, [(a, 33)]).slots
    rig.play(b, 33)
    found = _prefix(rig, list(range(500, 540)), 40)
    rig.play(found.slots[0], 40)
    rig.pool.commit(found.slots[0], list(range(500, 540)))
    parked = rig.acquire(140)
    rig.release(parked)
    before, faults = rig.looks(), fake.faults
    fake.fail_any(at, code)
    done = _CALLS[name](rig, a, b)
    fake.clear_faults()
    struck = fake.faults > faults
    if done is None:
        assert struck, name
        if name in _PARTLY:
            tables = [rig.look(device)[0] for device in range(size)]
            told = [[row[:3] for row in rows] for rows in (before[0], *tables)]
            assert all(one == told[0] for one in told), (name, at, told)
        else:
            assert rig.looks() == before, (name, at)
        assert _CALLS[name](rig, a, b) is not None, (name, at)  # nothing fails this time
    # A device that runs out of memory takes blocks from the parked slot; the others need not.
    rig.looks(maps=code != OUT_OF_MEMORY and (name not in _PARTLY or done is not None))
    rig.close()
    return struck, done is None


def sweep(size: int, code: int, names: Sequence[str] = ()) -> None:
    """If a driver call fails, the host call has taken effect on all devices or on none."""
    with _nothing_left():
        for name in names or _CALLS:
            failures = 0
            for at in range(1, 500):
                struck, failed = _life(name, size, at, code)
                failures += failed
                if not struck:
                    break
            else:
                raise AssertionError(f"{name} never ends")
            assert (failures == 0) == (name in _QUIET), (name, at, failures)
            assert failures == 0 or at > size, (name, at)


def faults() -> None:
    """Faults of programs on the devices are raised once, before the next call takes effect."""
    with _nothing_left():
        rig = Rig(3)
        slot = rig.acquire(40, range(9))
        before = rig.looks()
        for refusing in ((0, 1, 2), (2,)):
            for name in ("acquire", "extend", "release", "trim", "prefix"):
                for device in refusing:
                    devices.refuse(device, rig.shards[device].id, slot, 99)
                assert _CALLS[name](rig, slot, slot) is None, name
                assert rig.looks() == before
                rig.pool.take_fault()  # no fault is left
        for device in (1, 2):
            devices.refuse(device, rig.shards[device].id, slot, 77)
        with pytest.raises(_native.StatusError, match="77 tokens wanted") as raised:
            rig.pool.take_fault()
        assert raised.value.args[1] is _native.Reason.DEVICE_FAULT
        rig.pool.take_fault()
        assert rig.pool.take_warning() == ""
        rig.close()


def torn_generations() -> None:
    """A new generation starts when an acquire has run on some devices only."""
    with _nothing_left():
        rig = Rig(3)
        kept = rig.acquire(40, range(9))
        claim = rig.decided(lambda decision: rig.pool.acquire(decision, [20]))
        (torn,) = claim.slots
        devices.play(1, rig.shards[1].id, torn, 0)
        generations = rig.pool.new_generation()
        for _, _, lengths in generations:
            assert (lengths[kept], lengths[torn]) == (9, -1)
        rows, _ = rig.looks()
        assert [row[0] for row in rows] == [kept]
        assert rig.acquire(20) == torn
        rig.looks()
        rig.close()


def capacities() -> None:
    """A share of memory applies to each GPU, and the GPU with the least memory decides."""
    sharding = HeadSharding.of(make_spec(4), make_mesh(2), "tp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jax_kvpage.sharding.devices.place_of",
            lambda device: Place("cuda", "cuda", device.id),
        )
        free = {0: 8 << 30, 1: 6 << 30}
        patch.setattr(
            "jax_kvpage._capacity._available", lambda place: (free[place.ordinal], "a card")
        )
        assert total_bytes("50%", sharding) == 2 * (3 << 30)
        assert total_bytes("1GiB", sharding) == 1 << 30
        assert total_bytes(None, sharding) == 2 * sharding.local.resolve("cuda").virtual_bytes
        held = total_bytes("50%", sharding, "resize", 2 * (2 << 30), 7)
        assert held == 2 * (4 << 30)


def lowered_for_cuda(size: int) -> None:
    """A step over a mesh is lowered for GPUs: each device has its own ops, and nothing is
    gathered.
    """

    def step(cache: kvp.KVCache, q: Any, k: Any, v: Any, slots: Any) -> Any:
        batch = kvp.Batch.decode(slots)
        cache, ok = kvp.grow(cache, batch)
        batch = batch.mask(ok)
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=0)
        return out, kvp.advance(cache, batch)

    with make_pool(size, 8, block_tokens=None) as pool:
        slots, cache = pool.acquire(pool.cache(), [1, 1])
        operands = [place(pool, random(i, 2, 8, HEAD_DIM), HEADS) for i in range(3)]
        ids = place(pool, np.asarray(slots, np.int32), P())
        traced = jax.jit(step).trace(cache, *operands, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for op in ("map_slots", "update_and_attend", "plan_attention", "advance"):
            assert text.count(f"@jax_kvpage_{op}(") == 1, op
        heads = 8 // size
        assert f"tensor<2x{heads}x{HEAD_DIM}xf32>" in text
        assert not COLLECTIVES.search(text.replace("_", "-"))
        pool.check(pool.release(cache, slots))
