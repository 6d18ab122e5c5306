"""Memory is what is in use plus tails, virtual space is the full product, and XLA's temporaries do
not grow with either.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from harness import Rig, make_batch

import jax_kvpage as kvp


def _memfd_bytes() -> int:
    """Returns the bytes that the system has allocated for this process's memory files, which does
    not rely on the pool's own figure.
    """
    total = 0
    for link in pathlib.Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:"):
                total += os.stat(link).st_blocks * 512
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return total


def _mapped() -> list[range]:
    """Returns the addresses that the process has mapped, adjacent ones as one range.

    The total says less: other threads, for instance JAX's, map and unmap memory at any time.
    """
    spans: list[range] = []
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if spans and spans[-1].stop == begin:
            begin = spans.pop().start
        spans.append(range(begin, end))
    return spans


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_physical_follows_use(make_pool, layout: str) -> None:
    spec = kvp.CacheSpec(4, 2, 64, 64, 8192, dtype=jnp.bfloat16, layout=layout)
    files = _memfd_bytes()
    pool = make_pool(spec, "512MiB")
    assert pool.spec.virtual_bytes >= 64 * 8192 * pool.spec.token_bytes
    assert pool.stats().reserved_virtual == pool.spec.virtual_bytes
    assert _memfd_bytes() - files == pool.stats().physical

    rig = Rig(pool, max_tokens=1600, max_sequences=16)
    slots, rig.cache = pool.acquire(rig.cache, [100] * 64)
    address = pool.memory_ranges(slots[0])[0].address
    (reserved,) = (span for span in _mapped() if address in span)
    assert len(reserved) >= pool.spec.virtual_bytes
    for slot in slots:
        rig.model.acquire(slot)
    rig.write(dict.fromkeys(slots, 100))
    jax.block_until_ready(rig.cache)
    used = 64 * 100 * pool.spec.token_bytes
    physical = pool.stats().physical
    assert physical == _memfd_bytes() - files
    assert used <= physical <= used + 64 * pool.spec.tail_waste_bytes
    # Reading holes, as a view of everything does, must not allocate memory.
    if layout == "per_layer":
        jax.block_until_ready(jax.jit(jnp.sum)(pool.view(0)[0]))
        assert _memfd_bytes() - files == physical

    rig.release(*slots)
    jax.block_until_ready(rig.cache)
    assert pool.stats().parked > 0
    pool.trim()
    assert pool.stats().physical == _memfd_bytes() - files == 0
    pool.close()
    left = sum(
        max(min(span.stop, reserved.stop) - max(span.start, reserved.start), 0)
        for span in _mapped()
    )
    assert len(reserved) - left >= pool.spec.virtual_bytes


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("donate", [False, True])
def test_temporaries_do_not_grow(layout: str, donate: bool) -> None:
    def step(cache, q, k, v, batch):
        def body(cache, layer):
            out, cache = kvp.update_and_attend(
                q, k, v, cache, batch, layer=layer, implementation="cpu"
            )
            return cache, out

        cache, ok = kvp.map_slots(cache, batch.slots, cache.lengths[batch.slots] + 1)
        batch = batch.mask(ok)
        cache, outs = jax.lax.scan(body, cache, jnp.arange(cache.spec.num_layers))
        return kvp.advance(cache, batch), outs

    sizes = []
    for times in (1, 16):
        spec = kvp.CacheSpec(
            4, 2, 64, 64 * times, 4096 * times, dtype=jnp.bfloat16, layout=layout, block_tokens=64
        ).resolve("cpu")
        cache = kvp.KVCache(
            handle=jax.ShapeDtypeStruct((2,), jnp.int32),
            epoch=jax.ShapeDtypeStruct((1,), jnp.uint32),
            lengths=jax.ShapeDtypeStruct((64 * times,), jnp.int32),
            spec=spec,
        )
        tokens = [jax.ShapeDtypeStruct((8, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
        jitted = jax.jit(step, donate_argnums=0 if donate else ())
        compiled = jitted.lower(cache, *tokens, make_batch([(s, 1) for s in range(8)])).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] == sizes[1]


def test_capacity_beyond_the_machine_is_refused() -> None:
    spec = kvp.CacheSpec(2, 2, 64, 4, 256)
    with pytest.raises(kvp.OutOfBlocks, match=r"cgroup.*bytes of memory"):
        kvp.KVPool(spec, "900TiB")


def test_capacity_is_checked_against_the_cgroup(tmp_path: pathlib.Path) -> None:
    """Without root no test can lower its own limit; C++ tests check that the smallest of all limits
    counts.
    """
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = pathlib.Path(path).read_text().strip() if pathlib.Path(path).exists() else "max"
        if text != "max":
            limits.append(int(text))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min([total, *limits])
    with pytest.raises(kvp.OutOfBlocks, match=r"cgroup.*bytes of memory"):
        kvp.KVPool(kvp.CacheSpec(2, 2, 64, 4, 256), most + 2**30)


def test_the_number_of_mappings_is_checked() -> None:
    """A capacity whose blocks would need more mappings than the system allows is refused when the
    pool is created.
    """
    limit = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 2**20:
        pytest.skip(f"{limit} mappings would need more memory than a test may ask for")
    spec = kvp.CacheSpec(
        1, 1, 64, 2**15, 2**14, dtype=jnp.float32, layout="per_layer", block_tokens=16
    ).resolve("cpu")
    with pytest.raises(ValueError, match="max_map_count") as caught:
        kvp.KVPool(spec, (limit + 1) * spec.block_bytes)
    assert "block_tokens" in str(caught.value)
    # By default, the pool chooses blocks with which the same capacity fits.
    own = kvp.CacheSpec(1, 1, 64, 2**10, 2**14, dtype=jnp.float32, layout="per_layer")
    with kvp.KVPool(own, (limit + 1) * spec.block_bytes) as pool:
        assert pool.spec.block_tokens > 16


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1MiB", 2**20),
        ("1.5 MiB", 3 * 2**19),
        ("2048KiB", 2**21),
        ("2MB", 2 * 10**6),
        (2**21, 2**21),
    ],
)
def test_capacity_strings(text: str | int, size: int) -> None:
    with kvp.KVPool(kvp.CacheSpec(1, 1, 64, 2, 64, dtype=jnp.float32), text) as pool:
        block = pool.spec.block_bytes
        assert pool.stats().capacity == size // block * block


@pytest.mark.parametrize("bad", ["", "lots", "12 parsecs", "-1MiB", 0, -4096, "3B", 1.5, "120%"])
def test_bad_capacities(bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)capacity"):
        kvp.KVPool(kvp.CacheSpec(1, 1, 64, 2, 64), bad)


def test_blocks_are_allocated_when_claimed(make_pool) -> None:
    """Acquiring allocates memory at once, so running out is an error and not a signal at the first
    write.
    """
    pool = make_pool(kvp.CacheSpec(2, 2, 64, 4, 1024, dtype=jnp.float32), "8MiB")
    before = _memfd_bytes()
    pool.acquire(pool.cache(), 1024)
    assert _memfd_bytes() - before >= 1024 * pool.spec.token_bytes
