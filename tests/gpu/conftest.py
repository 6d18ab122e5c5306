"""The platform that tests marked gpu run on, and pools sized for the device.

Many of these tests are imported from the CPU tests, because the same must hold here. Those size
their pools for blocks of a few KiB; here a block is never smaller than 2 MiB.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import pytest

import jax_kvpage as kvp
from jax_kvpage._capacity import parse_bytes

_MOST = 4 * 2**30


@pytest.fixture(scope="session")
def platform(request: pytest.FixtureRequest) -> str:
    """ "cuda", or "cpu" to try out the tests themselves."""
    return request.config.getoption("--gpu-platform")


@pytest.fixture(autouse=True)
def device(platform: str) -> Iterator[jax.Device]:
    """Makes the platform's device the default."""
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        yield device


@pytest.fixture
def implementation(platform: str) -> str:
    """The name of the platform's kernels."""
    return platform


def capacity_for(spec: kvp.CacheSpec, capacity: str | int, platform: str) -> int:
    """Returns the bytes of as many blocks as `capacity` is on CPU, but at most what all slots
    need.
    """
    if platform == "cpu":
        return parse_bytes(capacity)
    here = spec.resolve("cuda")
    blocks = max(parse_bytes(capacity) // spec.resolve("cpu").block_bytes, 1)
    return min(blocks * here.block_bytes, max(here.virtual_bytes, here.block_bytes), _MOST)


@pytest.fixture
def make_pool(platform: str) -> Iterator[Callable[..., Any]]:
    """Returns a factory of pools that are closed when the test ends, even if it fails."""
    pools: list[kvp.KVPool] = []

    def make(spec: kvp.CacheSpec, capacity: str | int = "16MiB", **options: Any) -> kvp.KVPool:
        if spec.granule is None:
            capacity = capacity_for(spec, capacity, platform)
        pool = kvp.KVPool(spec, capacity, **options)
        pools.append(pool)
        if platform == "cuda":
            harness.ON_DEVICE.append(pool)
        return pool

    yield make
    gc.collect()
    for pool in pools:
        if pool in harness.ON_DEVICE:
            harness.ON_DEVICE.remove(pool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            pool.close()
