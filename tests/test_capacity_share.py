"""Capacities given as a share of the available memory, against numbers that the test reads
itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from pool_checks import check_totals, make_spec
from subprocesses import run_python

import jax_kvpage as kvp
from jax_kvpage import _capacity, _native
from jax_kvpage._cuda import Place

_GIB = 1 << 30


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how much memory the machine has available."""

    def set_bytes(value: int) -> None:
        monkeypatch.setattr(_native, "available_bytes", lambda: value)

    return set_bytes


@pytest.mark.parametrize(
    ("text", "share"), [("80%", 0.8), ("12.5 %", 0.125), (" 100% ", 1.0), ("0.1%", 0.001)]
)
def test_a_share(text: str, share: float, available: Any, make_pool) -> None:
    available(_GIB)
    pool = make_pool(make_spec(), text)
    size = pool.spec.block_bytes
    assert pool.stats().capacity == int(_GIB * share) // size * size


def test_the_machine_is_asked(make_pool) -> None:
    """MemAvailable, read here, is an upper bound; a cgroup may allow less."""
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    pool = make_pool(make_spec(), "10%")
    assert 0 < pool.stats().capacity < 0.11 * kib * 1024
    assert pool.stats().physical == 0  # blocks are allocated only as needed


def test_none_is_half_of_the_host_but_no_more_than_full_slots(available: Any, make_pool) -> None:
    available(8 << 20)
    large = kvp.CacheSpec(2, 2, 64, 64, 4096, dtype=jnp.float32, block_tokens=16)
    pool = make_pool(large, None)
    assert pool.stats().capacity == 4 << 20
    available(64 * _GIB)
    for layout in ("fused", "per_layer"):
        pool = kvp.KVPool(make_spec(layout))
        assert pool.stats().capacity == pool.spec.virtual_bytes
        slots, _ = pool.acquire(pool.cache(), [pool.spec.max_seq_len] * pool.spec.max_slots)
        assert len(slots) == pool.spec.max_slots
        check_totals(pool)
        pool.close()


def test_none_stays_within_the_mappings(available: Any, make_pool, monkeypatch: Any) -> None:
    available(512 * _GIB)
    monkeypatch.setattr(_native, "mapping_share", lambda: 2000)
    spec = kvp.CacheSpec(8, 8, 128, 256, 8192, layout="per_layer", block_tokens=16)
    for one in (spec, dataclasses.replace(spec, layout="fused", block_tokens=None)):
        size = _capacity.capacity_bytes("KVPool", None, one, Place("cpu", "cpu"))
        resolved = one.resolve("cpu", capacity=size)
        ranges = resolved.max_slots * resolved.num_ranges
        worst = _native.worst_mappings(
            size // resolved.block_bytes, ranges, resolved.blocks_per_range
        )
        assert worst <= max(2000, _native.worst_mappings(resolved.num_ranges, ranges, 1))
    pool = make_pool(make_spec(), None)
    pool.resize(None)


def test_resize_counts_what_the_pool_holds(available: Any, make_pool) -> None:
    pool = make_pool(make_spec(), "4MiB")
    _, _cache = pool.acquire(pool.cache(), [256, 256])
    held = pool.stats().physical
    assert held > 0
    available(1 << 20)
    pool.resize("50%")
    size = pool.spec.block_bytes
    assert check_totals(pool).capacity == ((1 << 20) + held) // 2 // size * size
    available(_GIB)
    pool.resize(None)
    assert check_totals(pool).capacity == pool.spec.virtual_bytes
    available(0)
    with pytest.raises(kvp.OutOfBlocks):
        pool.resize("50%")  # half of what live requests hold
    assert check_totals(pool).capacity == pool.spec.virtual_bytes


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "%", "5%%", "1e2%", "eighty%"])
def test_no_share(text: str, make_pool) -> None:
    with pytest.raises(ValueError, match="capacity"):
        kvp.KVPool(make_spec(), text)
    with pytest.raises(ValueError, match="capacity"):
        make_pool(make_spec()).resize(text)


def test_errors_have_the_numbers(available: Any, make_pool) -> None:
    spec = make_spec("per_layer").resolve("cpu")
    available(10_000)
    message = (
        rf"KVPool: capacity='10%' is 1000 bytes, 10% of the 10000 bytes available now on this "
        rf"machine.*smallest pool has 4 blocks of {spec.block_bytes} bytes"
    )
    with pytest.raises(ValueError, match=message):
        kvp.KVPool(spec, "10%")
    pool = make_pool(spec)
    available(-1)
    with pytest.raises(ValueError, match=r"not known here .*give a number of bytes"):
        kvp.KVPool(spec, None)
    with pytest.raises(ValueError, match="resize: capacity='5%': the memory available"):
        pool.resize("5%")


@pytest.mark.fake_driver
def test_a_share_of_a_device() -> None:
    """A share of the (fake) device's free memory, of which a second pool sees less."""
    run_python(
        """
    import jax.numpy as jnp
    import jax_kvpage as kvp
    from jax_kvpage import _native

    MIB = 1 << 20
    _native.fake_driver.configure(2 * MIB, 512 * MIB)
    spec = kvp.CacheSpec(2, 8, 128, 64, 1 << 16, dtype=jnp.float32)
    with kvp.KVPool(spec) as pool:
        size = pool.spec.block_bytes
        assert pool.stats().capacity == 512 * MIB * 8 // 10 // size * size
        slot, cache = pool.acquire(pool.cache(), 16384)
        held = pool.stats().physical
        assert held >= 16384 * spec.token_bytes
        with kvp.KVPool(spec, "50%") as second:
            left = (512 * MIB - held) // 2
            assert left - second.stats().capacity < second.spec.block_bytes
            assert second.stats().capacity <= left
        pool.resize("100%")
        assert 512 * MIB - pool.stats().capacity < pool.spec.block_bytes
""",
        env={"JAX_KVPAGE_FAKE_DRIVER": "cuda"},
    )


def test_a_device_that_is_not_there() -> None:
    with pytest.raises((kvp.KVPageError, ValueError), match=r"libcuda|CUDA device 99"):
        _capacity.checked(_native.free_device_bytes, 99)
