"""Memory mappings: the block sizes that `resolve` chooses for common models, and the process
limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import re
from typing import Any

import jax.numpy as jnp
import pytest
from subprocesses import run_python

import jax_kvpage as kvp
from jax_kvpage import _block_size, _native

# Layers, KV heads, head dim, longest sequence.
_MODELS = {
    "tiny_llama": (5, 2, 32, 512),
    "TinyLlama 1.1B": (22, 4, 64, 2048),
    "Llama 3.2 1B": (16, 8, 64, 8192),
    "Llama 3 8B": (32, 8, 128, 8192),
    "Llama 3 70B": (80, 8, 128, 8192),
    "Qwen 3 0.6B": (28, 8, 128, 32768),
    "Qwen 3 8B": (36, 8, 128, 32768),
    "Mistral 7B": (32, 8, 128, 32768),
    "Gemma 3 1B": (26, 1, 256, 32768),
    "Gemma 3 27B": (62, 16, 128, 32768),
}
_MIB = 2**20
_CAPACITIES = [64 * _MIB, 256 * _MIB, 1024 * _MIB, 4096 * _MIB, 16384 * _MIB, 65536 * _MIB]
_SLOTS = [8, 64, 512, 4096, 32768]
# Nine sixteenths of Linux's default limit of 65530 mappings.
_SHARE = 36855


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> int:
    """Sets the mapping share to that of the default limit, whatever this system's limit is."""
    monkeypatch.setattr(_native, "mapping_share", lambda: _SHARE)
    return _SHARE


def _open(model: str, slots: int, layout: Any) -> kvp.CacheSpec:
    layers, heads, dim, length = _MODELS[model]
    return kvp.CacheSpec(layers, heads, dim, slots, length, jnp.bfloat16, layout)


def _worst(resolved: kvp.CacheSpec, capacity: int) -> int:
    """Restates the worst case: every mapped block is a separate mapping, and every range ends in a
    hole.
    """
    ranges = resolved.max_slots * resolved.num_ranges
    mapped = min(capacity // resolved.block_bytes, ranges * resolved.blocks_per_range)
    return mapped + min(mapped, ranges) + 1


# block_tokens for capacities of 64 MiB, 1 GiB, 4 GiB and 64 GiB with 8, 512 and 32768 slots each.
_TABLE = {
    ("tiny_llama", "fused"): "112 112 112  112 112 112  112 112 224  112 112 512",
    ("tiny_llama", "per_layer"): "512 512 512  512 512 512  512 512 512  512 512 512",
    ("Llama 3.2 1B", "fused"): "32 32 32  32 32 32  32 32 32  32 64 128",
    ("Llama 3.2 1B", "per_layer"): "64 64 64  64 64 64  64 256 256  64 4096 4096",
    ("Llama 3 8B", "fused"): "32 32 32  32 32 32  32 32 32  32 32 32",
    ("Llama 3 8B", "per_layer"): "32 32 32  32 32 32  64 128 128  128 2048 2048",
    ("Llama 3 70B", "per_layer"): "32 32 32  32 32 32  64 128 128  512 2048 2048",
    ("Gemma 3 1B", "fused"): "32 32 32  32 32 32  32 32 32  32 128 256",
}


@pytest.mark.parametrize(("model", "layout"), _TABLE)
def test_resolved_blocks(share: int, model: str, layout: str) -> None:
    found = [
        _open(model, slots, layout).resolve("cpu", capacity).block_tokens
        for capacity in (64 * _MIB, 1024 * _MIB, 4096 * _MIB, 65536 * _MIB)
        for slots in (8, 512, 32768)
    ]
    assert found == [int(tokens) for tokens in _TABLE[model, layout].split()]


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_blocks_grow_only_where_the_limit_forces_it(share: int, model: str, layout: str) -> None:
    for capacity, slots in itertools.product(_CAPACITIES, _SLOTS):
        open_spec = _open(model, slots, layout)
        usual = open_spec.resolve("cpu")
        chosen = open_spec.resolve("cpu", capacity)
        case = f"{slots} slots, {capacity // _MIB} MiB, {chosen.block_tokens} tokens"
        assert _worst(chosen, capacity) <= share or chosen.blocks_per_range == 1, case
        if chosen.block_tokens == usual.block_tokens:
            continue
        assert _worst(usual, capacity) > share, case
        # Blocks of half the size would need too many mappings.
        half = max(usual.block_tokens, chosen.block_tokens // 32 * 16)
        smaller = dataclasses.replace(usual, block_tokens=half)
        assert _worst(smaller, capacity) > share, case
        # The first token of a request takes at most about a hundredth of the pool.
        assert chosen.num_ranges * chosen.block_bytes <= capacity * 1.01 / 100, case


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_the_limit_on_mappings_is_no_matter_of_cuda(share: int, model: str, layout: str) -> None:
    for capacity, slots in itertools.product(_CAPACITIES, _SLOTS):
        open_spec = _open(model, slots, layout)
        chosen = open_spec.resolve("cuda", capacity)
        assert chosen == open_spec.resolve("cuda")
        # One granule or the minimum number of tokens, plus the growth that avoids padding.
        least = _block_size.MIN_DEFAULT_BLOCK_TOKENS * chosen.token_bytes // chosen.num_ranges
        assert chosen.block_bytes <= _block_size.MAX_GROWTH_AGAINST_PADDING * max(2 * _MIB, least)


def test_the_pools_of_the_report(share: int) -> None:
    """Earlier defaults took 512 MiB for the first token, because they counted a mapping for every
    range of every slot, more than there are blocks.
    """
    many_ranges = kvp.CacheSpec(32, 8, 128, 512, 4096, layout="per_layer")
    assert many_ranges.resolve("cpu", 4096 * _MIB).block_tokens == 128
    many_slots = kvp.CacheSpec(4, 2, 64, 32768, 4096, layout="fused")
    assert many_slots.resolve("cpu", 1024 * _MIB) == many_slots.resolve("cpu")


def test_a_pool_that_chooses_leaves_room_for_the_next() -> None:
    open_spec = kvp.CacheSpec(1, 1, 64, 2**13, 2**14, dtype=jnp.float32, layout="per_layer")
    left = _native.mappings_left()
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(kvp.KVPool(open_spec, "4GiB")) for _ in range(3)]
        assert 0 < _native.mappings_left() < left
    tokens = [pool.spec.block_tokens for pool in pools]
    assert tokens == sorted(tokens)
    if _native.max_map_count() < 2**17:
        assert tokens[0] < tokens[2]


def test_a_pool_is_refused_what_others_were_promised() -> None:
    gc.collect()
    left = _native.mappings_left()
    slots = left // 3  # two mappings each, when one block of each is mapped
    if slots > 2**18:
        slots = 2**18
    fixed = kvp.CacheSpec(
        1, 1, 64, slots, 64, dtype=jnp.float32, layout="per_layer", block_tokens=16
    )
    size = slots * 4096
    with kvp.KVPool(fixed, size) as one:
        assert left - _native.mappings_left() == pytest.approx(2 * slots, rel=0.01)
        if slots == left // 3:
            with pytest.raises(ValueError) as caught:
                kvp.KVPool(fixed, size)
            for part in (
                f"{slots} blocks of 4096 bytes may need",
                "are left: vm.max_map_count allows this process",
                "are reserved for its pools",
                "are kept for threads and compiled programs",
                "raise vm.max_map_count (sysctl)",
            ):
                assert part in str(caught.value)
            # Its advice works.
            advised = re.search(
                r"block_tokens of at least (\d+).* at most (\d+) bytes", str(caught.value)
            )
            assert advised is not None
            larger = dataclasses.replace(fixed, block_tokens=int(advised[1]))
            for other, most in ((larger, size), (fixed, int(advised[2]))):
                with kvp.KVPool(other, most):
                    pass
            with pytest.raises(ValueError, match=r"^resize: .*memory mappings"):
                one.resize(4 * size)
        one.resize(size // 2)
        with kvp.KVPool(fixed, size // 2):
            pass
    assert _native.mappings_left() == pytest.approx(left, rel=0.01)


def test_pools_at_their_limit_leave_room_for_the_compiler() -> None:
    """Three pools map everything that they were promised; then programs are compiled and threads
    start.
    """
    if _native.max_map_count() > 2**17:
        pytest.skip("the limit is out of reach here; the account is tested in C++ too")
    run_python(
        """
        import threading
        import jax, jax.numpy as jnp
        import jax_kvpage as kvp
        from jax_kvpage import _native

        def spec(slots):
            return kvp.CacheSpec(
                1, 1, 64, slots, 64, dtype=jnp.float32, layout="per_layer", block_tokens=16
            )

        jax.block_until_ready(jnp.ones(8) + 1)
        total = _native.max_map_count()
        pools = []
        for part in (0.2, 0.16, 0.3):  # the third is refused and made smaller
            slots = int(total * part)
            try:
                pools.append(kvp.KVPool(spec(slots), slots * 4096))
            except ValueError as error:
                assert "mappings" in str(error), error
                assert len(pools) == 2
                slots = (_native.mappings_left() - 64) // 2
                pools.append(kvp.KVPool(spec(slots), slots * 4096))
        for pool in pools:
            # A token each: half of a slot's ranges are mapped, and every mapped range has a hole.
            pool.acquire(pool.cache(), [1] * (pool.spec.max_slots // 2))
        with open("/proc/self/maps") as file:
            assert sum(1 for _ in file) > 0.8 * total
        for size in range(2, 10):
            jax.block_until_ready(jax.jit(lambda x: jnp.sin(x @ x.T) + x)(jnp.ones((size, size))))
        threads = [threading.Thread(target=threading.Event().wait, args=(0.2,)) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        """
    )
