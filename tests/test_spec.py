"""CacheSpec: the arithmetic of blocks and slots, the defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvpage as kvp
from jax_kvpage import _block_size, _native

_MODELS = {
    "llama-8b": (32, 8, 128, 16, 8192),
    "llama-1b": (16, 8, 64, 64, 8192),
    "odd": (30, 3, 40, 8, 1000),
    "tiny": (2, 2, 32, 4, 256),
    "one-head": (1, 1, 8, 2, 64),
}


def _spec(model: str = "tiny", **options: Any) -> kvp.CacheSpec:
    return kvp.CacheSpec(*_MODELS[model], **options)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_defaults_are_valid(model: str, layout: Any, platform: str) -> None:
    spec = _spec(model, layout=layout).resolve(platform)
    granule = 4096 if platform == "cpu" else 2 * 1024 * 1024
    layers, heads, dim, slots, length = _MODELS[model]
    token = 2 * layers * heads * dim * 2  # bfloat16
    ranges = 1 if layout == "fused" else 2 * layers
    blocks = -(-length // spec.block_tokens)
    assert spec.token_bytes == token
    assert spec.num_ranges == ranges
    assert spec.blocks_per_range == blocks
    assert spec.block_tokens % 16 == 0
    assert spec.block_bytes % granule == 0
    assert spec.slot_bytes == ranges * blocks * spec.block_bytes
    assert spec.virtual_bytes == slots * spec.slot_bytes
    padding = spec.block_bytes * ranges - spec.block_tokens * token
    assert 0 <= padding < granule
    if layout == "per_layer":
        assert padding == 0  # slots are dense arrays


def test_default_on_cpu_is_fused_and_near_its_target() -> None:
    spec = _spec("llama-1b").resolve("cpu")
    assert spec.layout == "fused"
    assert spec.block_tokens == 32  # one block is far above the target, hence the minimum
    spec = kvp.CacheSpec(4, 2, 64, 8, 8192).resolve("cpu")  # 2 KiB per token
    assert spec.block_bytes == _block_size.FUSED_TARGET_BYTES
    spec = dataclasses.replace(kvp.CacheSpec(4, 2, 64, 8, 8192), layout="per_layer").resolve("cpu")
    assert spec.block_bytes == _block_size.PER_LAYER_TARGET_BYTES


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", ["odd", "tiny"])
def test_tail_waste_is_the_largest_over_all_lengths(model: str, layout: Any) -> None:
    spec = _spec(model, layout=layout).resolve("cpu")
    wasted = [
        -(-n // spec.block_tokens) * spec.block_bytes * spec.num_ranges - n * spec.token_bytes
        for n in range(1, spec.max_seq_len + 1)
    ]
    assert spec.tail_waste_bytes == max(wasted)


def test_tail_waste_with_padding() -> None:
    spec = _spec("odd", layout="fused", block_tokens=16, dtype=jnp.float32).resolve("cpu")
    assert spec.block_bytes > spec.block_tokens * spec.token_bytes
    wasted = [
        -(-n // 16) * spec.block_bytes - n * spec.token_bytes
        for n in range(1, spec.max_seq_len + 1)
    ]
    assert spec.tail_waste_bytes == max(wasted)


def test_large_capacity_takes_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "mapping_share", lambda: 32765)
    open_spec = _spec("llama-1b", layout="per_layer")
    small = open_spec.resolve("cpu", capacity=1 << 30)
    large = open_spec.resolve("cpu", capacity=1 << 36)
    assert large.block_tokens > small.block_tokens
    blocks = min((1 << 36), large.virtual_bytes) // large.block_bytes
    assert blocks + min(blocks, large.max_slots * large.num_ranges) + 1 <= 32765
    assert large.block_tokens % small.block_tokens == 0
    # A size chosen by the user is kept.
    chosen = dataclasses.replace(open_spec, block_tokens=64).resolve("cpu", capacity=1 << 36)
    assert chosen.block_tokens == 64
    # Whatever the number of mappings, a block never exceeds the longest sequence.
    monkeypatch.setattr(_native, "mapping_share", lambda: 10)
    most = open_spec.resolve("cpu", capacity=1 << 36)
    assert most.blocks_per_range == 1
    assert most.block_tokens == 8192


def test_fingerprint() -> None:
    spec = kvp.CacheSpec(3, 2, 64, 5, 512, jnp.float16, "per_layer", 32).resolve("cpu")
    assert spec.as_ints() == (3, 2, 64, 5, 512, 2, 1, 32)
    codes = {
        (str(dtype), layout): kvp.CacheSpec(1, 8, 64, 1, 512, dtype, layout)
        .resolve("cpu")
        .as_ints()[5:7]
        for dtype, layout in itertools.product(["float32", "bfloat16"], ["fused", "per_layer"])
    }
    assert list(codes.values()) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_is_a_value() -> None:
    one, two = _spec(dtype=jnp.float32), _spec(dtype="float32")
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    assert one != _spec()
    assert one != one.resolve("cpu")
    assert one != "a spec"
    assert one.resolve("cpu") == two.resolve("cpu") != two.resolve("cuda")
    assert one.resolve("cpu").resolve("cpu") == one.resolve("cpu")
    copy = pickle.loads(pickle.dumps(one.resolve("cpu")))
    assert copy == one.resolve("cpu")
    assert hash(copy) == hash(one.resolve("cpu"))
    assert "block_tokens=" in repr(one.resolve("cpu"))


@pytest.mark.parametrize(
    "name",
    [
        "block_bytes",
        "slot_bytes",
        "virtual_bytes",
        "tail_waste_bytes",
        "num_ranges",
        "blocks_per_range",
    ],
)
def test_unresolved_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"spec\.resolve\(platform\)"):
        getattr(_spec(), name)


def test_unresolved_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match=r"as_ints.*resolve"):
        _spec().as_ints()


def test_all_mistakes_in_one_error() -> None:
    with pytest.raises(ValueError) as caught:
        kvp.CacheSpec(0, 1.5, -2, True, "8", jnp.int16, "paged", 17)
    message = str(caught.value)
    for part in (
        "num_layers must be an integer from 1 to 2147483647, got 0",
        "num_kv_heads must be an integer from 1 to 2147483647, got 1.5",
        "head_dim must be an integer from 1 to 2147483647, got -2",
        "max_slots must be an integer from 1 to 1048576, got True",
        "max_seq_len must be an integer from 1 to 2147483632, got '8'",
        "dtype must be one of float32, bfloat16, float16, int8, float8_e4m3fn, got",
        "layout must be 'fused' or 'per_layer' (or None for the default), got 'paged'",
        "block_tokens must be a multiple of 16, got 17: the nearest is 16 or 32",
    ):
        assert part in message
    assert message.count("\n  - ") == 8


@pytest.mark.parametrize(
    "dtype", [jnp.uint8, jnp.float64, jnp.float8_e5m2, "no such dtype", object()]
)
def test_unsupported_storage(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, float8_e4m3fn, got"):
        _spec(dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_quantized_storage_counts_its_scales(model: str, layout: Any, dtype: Any) -> None:
    layers, heads, dim, slots, length = _MODELS[model]
    spec = _spec(model, layout=layout, dtype=dtype).resolve("cpu")
    assert spec.quantized
    assert not _spec(model).quantized
    assert spec.token_bytes == 2 * layers * heads * (dim + 4)
    assert spec.as_ints()[5] == (3 if dtype == jnp.int8 else 4)
    assert spec.block_bytes % 4096 == 0
    padding = spec.block_bytes * spec.num_ranges - spec.block_tokens * spec.token_bytes
    assert 0 <= padding < 4096 * spec.num_ranges
    assert spec.virtual_bytes == slots * spec.slot_bytes
    wasted = [
        -(-n // spec.block_tokens) * spec.block_bytes * spec.num_ranges - n * spec.token_bytes
        for n in range(1, length + 1)
    ]
    assert spec.tail_waste_bytes == max(wasted)


def test_quantized_blocks_may_be_padded_in_both_layouts() -> None:
    """A per-layer slot with scales is not a dense array, so padding loses nothing."""
    spec = kvp.CacheSpec(2, 2, 64, 4, 256, jnp.int8, "per_layer", 32).resolve("cpu")
    assert spec.block_bytes == 2 * 4096
    assert spec.block_tokens * spec.token_bytes // spec.num_ranges == 32 * 2 * 68


@pytest.mark.parametrize("block_tokens", [0, -16, 16.0, True])
def test_block_tokens_is_a_positive_integer(block_tokens: Any) -> None:
    with pytest.raises(ValueError, match="block_tokens must be a positive integer"):
        _spec(block_tokens=block_tokens)


def test_per_layer_blocks_fill_granules() -> None:
    spec = kvp.CacheSpec(2, 2, 24, 4, 256, jnp.float32, "per_layer", 80)  # 192 bytes per token
    with pytest.raises(
        ValueError, match=r"block_tokens=80 .*4096-byte granules.*nearest that works is 64 or 128"
    ):
        spec.resolve("cpu")
    assert dataclasses.replace(spec, block_tokens=128).resolve("cpu").block_bytes == 6 * 4096
    assert dataclasses.replace(spec, layout="fused").resolve("cpu").block_tokens == 80


def test_unknown_platform() -> None:
    with pytest.raises(ValueError, match="platform must be 'cpu' or 'cuda', got 'tpu'"):
        _spec().resolve("tpu")


def test_map_limit_is_read() -> None:
    assert 0 < _native.mapping_share() <= _native.max_map_count()


_EXTREMES = (
    *(0, 1, 2**31 - 1, 2**31, 2**62, 2**63, 2**70, -1, -(2**31)),
    *(True, False, 1.0, 0.5, float("nan"), float("inf"), "8", None, [], {}),
    *(np.int8(5), np.int64(-1), np.uint64(2**63), np.int64(2**31 - 1)),
    *(np.float32(2), np.bool_(True), np.zeros(2, np.int32)),
)
_FIELDS = ["num_layers", "num_kv_heads", "head_dim", "max_slots", "max_seq_len"]


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("field", [*_FIELDS, "block_tokens", "granule", "dtype", "layout"])
def test_an_extreme_value_works_or_its_field_is_named(field: str, layout: Any) -> None:
    values = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "max_slots": 2, "layout": layout}
    usual: dict[str, Any] = values | {"max_seq_len": 64, "dtype": jnp.float32}
    for value in _EXTREMES:
        named = True
        try:
            spec = kvp.CacheSpec(**(usual | {field: value}))
            chosen = getattr(spec, field)
            assert isinstance(chosen, np.dtype) or type(chosen) in (int, str, type(None))
            for platform in ("cpu", "cuda"):
                spec.resolve(platform, capacity=2**24)
            with kvp.KVPool(spec, "16MiB") as pool:
                pool.acquire(pool.cache(), 1)
        except ValueError as error:
            named = field in str(error)
        assert named, repr(value)


@pytest.mark.parametrize("fields", [*itertools.combinations(_FIELDS, 3)])
def test_sizes_that_are_too_large_together_are_named(fields: tuple[str, ...]) -> None:
    usual = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "max_slots": 2, "max_seq_len": 64}
    largest = {"max_slots": 2**20, "max_seq_len": 2**31 - 16}
    sizes = usual | {field: largest.get(field, 2**31 - 1) for field in fields}
    for layout, platform in itertools.product(["fused", "per_layer"], ["cpu", "cuda"]):
        spec = kvp.CacheSpec(**sizes, layout=layout)
        with pytest.raises(ValueError, match=f"{fields[0]}=") as caught:
            spec.resolve(platform, capacity=2**40)
        assert "63 bits" in str(caught.value) or "ranges" in str(caught.value)


def test_a_longest_sequence_beyond_int32_is_named() -> None:
    with pytest.raises(ValueError, match=r"max_seq_len must be .* to 2147483632, got 2147483647"):
        kvp.CacheSpec(1, 1, 64, 1, 2**31 - 1)
    assert kvp.CacheSpec(1, 1, 64, 1, 2**31 - 16).resolve("cpu").max_seq_len == 2**31 - 16


@pytest.mark.parametrize("capacity", [0, -1, 2**63, 1.5, "1GiB", True])
def test_resolve_refuses_other_capacities(capacity: Any) -> None:
    with pytest.raises(ValueError, match="capacity must be an integer from 1 to"):
        _spec().resolve("cpu", capacity=capacity)
