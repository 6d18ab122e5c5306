"""CacheSpec: shape of a KV cache, and the layout of its memory in slots, ranges and blocks.

All layout arithmetic in Python is here; the C++ core computes the same numbers from the eight
integers of `CacheSpec.as_ints` and the block size.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jax_kvpage._block_size import TOKEN_MULTIPLE, choose_block_tokens, round_up
from jax_kvpage._values import MAX_INT32, is_integer, raise_all

__all__ = ["CacheSpec"]

Layout = Literal["fused", "per_layer"]

# The smallest mappable unit of memory, in bytes: a page, or CUDA's allocation granularity.
GRANULE_BYTES = {"cpu": 4096, "cuda": 2 * 1024 * 1024}
DEFAULT_LAYOUT: dict[str, Layout] = {"cpu": "fused", "cuda": "fused"}

LAYOUT_CODES: dict[str, int] = {"fused": 0, "per_layer": 1}
DTYPE_CODES: dict[Any, int] = {
    np.dtype(jnp.float32): 0,
    np.dtype(jnp.bfloat16): 1,
    np.dtype(jnp.float16): 2,
    np.dtype(jnp.int8): 3,
    np.dtype(jnp.float8_e4m3fn): 4,
}
# Stored with a float32 scale for each token and KV head, for keys and for values (quantize.py).
QUANTIZED_DTYPES = frozenset({np.dtype(jnp.int8), np.dtype(jnp.float8_e4m3fn)})
SCALE_BYTES = 4
# The largest value of each size. Positions are int32, up to the end of the last block; a pool's
# tables, on the host and in programs, have a row for each slot.
_LARGEST = {
    "num_layers": MAX_INT32,
    "num_kv_heads": MAX_INT32,
    "head_dim": MAX_INT32,
    "max_slots": 2**20,
    "max_seq_len": MAX_INT32 // TOKEN_MULTIPLE * TOKEN_MULTIPLE,
}
# Limit on the ranges of all slots together. The host's tables take four bytes for each slot and
# layer, half a GiB at this limit; block numbers are stored only for mapped blocks.
_MAX_RANGES = 2**28
_MAX_INT64 = 2**63 - 1


@dataclasses.dataclass(frozen=True, eq=True)
class CacheSpec:
    """Shape, storage and memory layout of a KV cache.

    A spec is hashable and is static metadata of `KVCache`; programs compiled for a spec work with
    every pool of that spec. `layout` and `block_tokens` may be None at first; `resolve`, which
    `KVPool` calls, chooses them for a platform.

    Attributes:
        num_layers: number of transformer layers L.
        num_kv_heads: key/value heads of each layer.
        head_dim: elements of one head, the same for keys and values.
        max_slots: number of sequences that the cache can hold at the same time, at most 2**20.
        max_seq_len: tokens for which each slot has virtual memory, at most 2**31 - 16.
        dtype: storage type: float32, bfloat16 or float16; or int8 or float8_e4m3fn, quantized on
            append, with a float32 scale for each token and head of keys and of values.
        layout: "fused" (a block holds some tokens of all layers), "per_layer" (each layer's K and V
            are separate ranges, dense arrays unless quantized) or None, the platform's default.
        block_tokens: tokens in one physical block, a multiple of 16, or None for a size that suits
            the model.
        granule: bytes of the platform's smallest mappable unit of memory; set by `resolve`.

    Raises:
        ValueError: lists every invalid value.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_slots: int
    max_seq_len: int
    dtype: Any = jnp.bfloat16
    layout: Layout | None = None
    block_tokens: int | None = None
    granule: int | None = dataclasses.field(default=None, kw_only=True)
    # Not a field: `dataclasses.asdict` must return only arguments of the constructor.
    _hash: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Checks and normalizes all values."""
        reasons = []
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= most:
                reasons.append(f"{name} must be an integer from 1 to {most}, got {value!r}")
            else:
                object.__setattr__(self, name, int(value))
        try:
            dtype = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError, KeyError):  # NumPy raises any of these
            dtype = None
        if dtype not in DTYPE_CODES:
            supported = ", ".join(d.name for d in DTYPE_CODES)
            reasons.append(f"dtype must be one of {supported}, got {self.dtype!r}")
        layout = self.layout
        if layout is not None and not (isinstance(layout, str) and layout in LAYOUT_CODES):
            known = " or ".join(repr(name) for name in LAYOUT_CODES)
            reasons.append(f"layout must be {known} (or None for the default), got {self.layout!r}")
        tokens = self.block_tokens
        if tokens is not None:
            if not is_integer(tokens) or not 1 <= tokens <= MAX_INT32:
                reasons.append(f"block_tokens must be a positive integer or None, got {tokens!r}")
            elif tokens % TOKEN_MULTIPLE:
                reasons.append(
                    f"block_tokens must be a multiple of {TOKEN_MULTIPLE}, got {tokens}: the "
                    f"nearest is {_nearest(tokens, TOKEN_MULTIPLE)}"
                )
            else:
                object.__setattr__(self, "block_tokens", int(tokens))
        if self.granule is not None and (
            not is_integer(self.granule) or self.granule not in GRANULE_BYTES.values()
        ):
            reasons.append(f"granule is set by resolve(), got {self.granule!r}")
        raise_all("CacheSpec", reasons)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "_hash", hash(self._values()))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __hash__(self) -> int:
        """Cached, because each dispatch of a jitted program hashes the static arguments."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Compares values; fast for identical objects, the usual case in a loop of steps."""
        if self is other:
            return True
        if not isinstance(other, CacheSpec):
            return NotImplemented
        return hash(self) == hash(other) and self._values() == other._values()

    def __reduce__(self) -> Any:
        """Drops the cached hash, because hashes of strings differ between processes."""
        return _rebuild, self._values()

    def resolve(self, platform: str, capacity: int | None = None) -> "CacheSpec":
        """Chooses the unset values for a platform.

        Args:
            platform: "cpu" or "cuda".
            capacity: bytes of physical memory that the pool will have. If it is given, the platform
                is CPU and `block_tokens` is None, blocks are made so large that the pool needs no
                more than its share of the mappings that the system allows this process
                (vm.max_map_count), less those promised to earlier pools.

        Returns:
            A spec with layout, block_tokens and granule set.

        Raises:
            ValueError: an unknown platform, a `block_tokens` that cannot work there, a capacity
                that is not a positive integer, or sizes whose product is too large.
        """
        if platform not in GRANULE_BYTES:
            known = " or ".join(repr(name) for name in GRANULE_BYTES)
            raise ValueError(f"CacheSpec.resolve: platform must be {known}, got {platform!r}")
        if capacity is not None and (not is_integer(capacity) or not 1 <= capacity <= _MAX_INT64):
            raise ValueError(
                f"CacheSpec.resolve: capacity must be an integer from 1 to {_MAX_INT64}, "
                f"got {capacity!r}"
            )
        granule = GRANULE_BYTES[platform]
        if self.resolved and self.granule == granule:
            self._check_sizes()
            return self
        layout = self.layout or DEFAULT_LAYOUT[platform]
        spec = dataclasses.replace(self, layout=layout, granule=granule)
        unit = spec._token_unit()
        if self.block_tokens is None:
            tokens = choose_block_tokens(
                spec,
                granule,
                spec._block_token_bytes(),
                unit,
                spec._may_pad,
                # GPU memory takes none of the process's mappings.
                int(capacity) if capacity is not None and platform == "cpu" else None,
            )
            spec = dataclasses.replace(spec, block_tokens=tokens)
            spec._check_sizes()
            return spec
        if not spec._may_pad and self.block_tokens % unit:
            raise ValueError(
                f"CacheSpec: block_tokens={self.block_tokens} is impossible for layout 'per_layer' "
                f"on {platform}: a block of {spec._block_token_bytes()} bytes a token must fill "
                f"whole {granule}-byte granules, so that slots are dense arrays; the nearest that "
                f"works is {_nearest(self.block_tokens, unit)} (or leave it None, or use "
                "layout='fused', which may pad)"
            )
        spec._check_sizes()
        return spec

    def _check_sizes(self) -> None:
        """Raises a ValueError that names the sizes whose product is too large."""
        reasons = []
        if self.virtual_bytes > _MAX_INT64:
            sizes = ", ".join(f"{name}={getattr(self, name)}" for name in _LARGEST)
            reasons.append(
                f"{sizes} and block_tokens={self.block_tokens} are {self.virtual_bytes} bytes of "
                "virtual memory together, which do not fit 63 bits"
            )
        ranges = self.max_slots * self.num_ranges
        if ranges > _MAX_RANGES:
            reasons.append(
                f"max_slots={self.max_slots} with {self.num_ranges} ranges a slot (2 * num_layers, "
                f"num_layers={self.num_layers}) are {ranges} ranges, at most {_MAX_RANGES} work"
            )
        raise_all("CacheSpec", reasons)

    def _block_token_bytes(self) -> int:
        """Bytes of one token in one block: of all layers (fused), or of one layer's K or V."""
        return self.token_bytes // self.num_ranges

    @property
    def _may_pad(self) -> bool:
        """Whether blocks may end in padding; not if slots must be dense arrays."""
        return self.layout == "fused" or self.quantized

    def _token_unit(self) -> int:
        """The smallest multiple of 16 tokens that exactly fills whole granules."""
        assert self.granule is not None
        per_granule = self.granule // math.gcd(self.granule, self._block_token_bytes())
        return math.lcm(TOKEN_MULTIPLE, per_granule)

    @property
    def resolved(self) -> bool:
        """Whether layout, block_tokens and granule are all known."""
        return None not in (self.layout, self.block_tokens, self.granule)

    def _require_resolved(self, what: str) -> tuple[int, int]:
        if self.block_tokens is None or self.granule is None or self.layout is None:
            raise ValueError(
                f"CacheSpec.{what} is known only after spec.resolve(platform); "
                "pool.spec and cache.spec are resolved"
            )
        return self.block_tokens, self.granule

    @property
    def quantized(self) -> bool:
        """Whether keys and values are stored with scales."""
        return self.dtype in QUANTIZED_DTYPES

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, K and V, including scales."""
        row_bytes = self.head_dim * np.dtype(self.dtype).itemsize
        row_bytes += SCALE_BYTES if self.quantized else 0
        return 2 * self.num_layers * self.num_kv_heads * row_bytes

    @property
    def num_ranges(self) -> int:
        """Virtual ranges of a slot: 1 if fused, else one per layer for each of K and V."""
        if self.layout is None:
            self._require_resolved("num_ranges")
        return 1 if self.layout == "fused" else 2 * self.num_layers

    @property
    def blocks_per_range(self) -> int:
        """Blocks that one range of a slot holds when it is full."""
        block_tokens, _ = self._require_resolved("blocks_per_range")
        return -(-self.max_seq_len // block_tokens)

    @property
    def block_bytes(self) -> int:
        """Bytes of one physical block, including padding."""
        block_tokens, granule = self._require_resolved("block_bytes")
        return round_up(block_tokens * self._block_token_bytes(), granule)

    @property
    def slot_bytes(self) -> int:
        """Virtual bytes of one slot."""
        return self.num_ranges * self.blocks_per_range * self.block_bytes

    @property
    def virtual_bytes(self) -> int:
        """Virtual bytes that a pool of this spec reserves."""
        return self.max_slots * self.slot_bytes

    @property
    def tail_waste_bytes(self) -> int:
        """The most bytes that a slot can have mapped beyond those of its tokens.

        A slot of n tokens has b = ceil(n / block_tokens) blocks mapped in each range, so it wastes
        `b * block_bytes * num_ranges - n * token_bytes`. The maximum is at the largest b, because
        every block may have padding, with a single token in the last block.
        """
        block_tokens, _ = self._require_resolved("tail_waste_bytes")
        blocks = self.blocks_per_range
        fewest_tokens = (blocks - 1) * block_tokens + 1
        return blocks * self.block_bytes * self.num_ranges - fewest_tokens * self.token_bytes

    def as_ints(self) -> tuple[int, ...]:
        """The eight integers by which compiled programs and the pool compare specs.

        Returns:
            num_layers, num_kv_heads, head_dim, max_slots, max_seq_len, dtype code (float32 0,
            bfloat16 1, float16 2, int8 3, float8_e4m3fn 4), layout code (fused 0, per_layer 1),
            block_tokens.
        """
        block_tokens, _ = self._require_resolved("as_ints()")
        return (
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.max_slots,
            self.max_seq_len,
            DTYPE_CODES[self.dtype],
            LAYOUT_CODES[str(self.layout)],
            block_tokens,
        )


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, round_up(value, unit)
    return f"{below} or {above}" if below else f"{above}"


def _rebuild(*values: Any) -> CacheSpec:
    *positional, granule = values
    return CacheSpec(*positional, granule=granule)
