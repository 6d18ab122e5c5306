"""Pools on the fake driver, for test programs that run with it."""

from __future__ import annotations

import gc
from typing import Any

import jax_kvpage as kvp
from jax_kvpage import _native

fake = _native.fake_driver
pools: list[kvp.KVPool] = []  # open pools


def make_pool(spec: kvp.CacheSpec, capacity: int, **options: Any) -> kvp.KVPool:
    """A pool that `end` closes."""
    pools.append(kvp.KVPool(spec, capacity, **options))
    return pools[-1]


def end(*stores: kvp.HostStore) -> None:
    """Closes all pools, then these stores."""
    while pools:
        pools.pop().close()
    for store in stores:
        store.close()


def nothing_alive() -> None:
    """Asserts that nothing that the driver has handed out is still alive."""
    gc.collect()
    counts, violation = fake.report()
    assert not any(counts.values()), (counts, violation)
