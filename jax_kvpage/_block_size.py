"""Chooses the default block size: how many tokens one physical allocation holds."""

import dataclasses
from typing import TYPE_CHECKING

from jax_kvpage import _native
from jax_kvpage._values import MAX_INT32

if TYPE_CHECKING:
    from jax_kvpage.spec import CacheSpec

__all__ = ["TOKEN_MULTIPLE", "choose_block_tokens", "round_up"]

# The size of one physical allocation is a compromise: small blocks waste less memory at the end of
# a sequence, large ones need fewer mappings and system calls. On CPU, mapping takes 4 us for 64 KiB
# and for 2 MiB alike, and reading scattered 64 KiB blocks is within 5% of reading one dense array,
# so the defaults are small. A block of the per-layer layout holds one layer's K or V: growing a
# sequence maps 2 * num_layers of them, where the fused layout maps one larger block.
FUSED_TARGET_BYTES = 128 * 1024
PER_LAYER_TARGET_BYTES = 64 * 1024
MIN_DEFAULT_BLOCK_TOKENS = 32
# Kernels walk a block in steps of this many tokens.
TOKEN_MULTIPLE = 16
# If blocks may be padded up to the granule (fused, quantized), a size without padding is preferred
# unless it takes more than this many times the target number of tokens.
MAX_GROWTH_AGAINST_PADDING = 4


def round_up(value: int, multiple: int) -> int:
    """Rounds a value up to a multiple."""
    return -(-value // multiple) * multiple


def choose_block_tokens(
    spec: "CacheSpec",
    granule: int,
    token_bytes: int,
    unit: int,
    may_pad: bool,
    capacity: int | None,
) -> int:
    """Chooses the number of tokens in a block for a spec that does not set it.

    Args:
        spec: with layout and granule set.
        granule: the spec's granule in bytes.
        token_bytes: bytes that one token takes in one block.
        unit: multiples of this many tokens fill whole granules.
        may_pad: whether a block may also have any other multiple of 16 tokens, with padding.
        capacity: bytes of physical memory: blocks are made large enough that the pool needs no more
            than its share of the process's mappings. None if mappings do not matter.
    """
    fused = spec.layout == "fused"
    target = max(FUSED_TARGET_BYTES if fused else PER_LAYER_TARGET_BYTES, granule)
    wanted = max(MIN_DEFAULT_BLOCK_TOKENS, -(-target // token_bytes))
    # A block larger than the longest sequence would only be padding.
    wanted = min(wanted, round_up(spec.max_seq_len, TOKEN_MULTIPLE))
    tokens = round_up(wanted, unit)
    if may_pad and tokens > MAX_GROWTH_AGAINST_PADDING * wanted:
        # Padding is unavoidable: use as many tokens as fit in the granules.
        held = round_up(wanted * token_bytes, granule)
        tokens = held // token_bytes // TOKEN_MULTIPLE * TOKEN_MULTIPLE
        tokens = max(wanted, min(tokens, round_up(spec.max_seq_len, TOKEN_MULTIPLE)))
        tokens = round_up(tokens, TOKEN_MULTIPLE)
    if capacity is None:
        return tokens
    share = _native.mapping_share()
    multiple = TOKEN_MULTIPLE if may_pad else unit
    largest = min(round_up(spec.max_seq_len, multiple), MAX_INT32 // multiple * multiple)
    while tokens < largest and _worst_mappings(spec, tokens, capacity) > share:
        tokens = min(2 * tokens, largest)
    return tokens


def _worst_mappings(spec: "CacheSpec", block_tokens: int, capacity: int) -> int:
    """The most mappings that a pool with blocks of this size and this capacity can need."""
    spec = dataclasses.replace(spec, block_tokens=block_tokens)
    blocks = capacity // spec.block_bytes
    return _native.worst_mappings(blocks, spec.max_slots * spec.num_ranges, spec.blocks_per_range)
