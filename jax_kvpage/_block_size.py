"""The default size of a block: how many tokens of a spec one physical allocation holds."""

import dataclasses
from typing import TYPE_CHECKING

from jax_kvpage import _native

if TYPE_CHECKING:
    from jax_kvpage.spec import CacheSpec

__all__ = ["MAX_INT32", "TOKEN_MULTIPLE", "choose_block_tokens", "round_up"]

# The size of one physical allocation is a compromise: small blocks waste little at the tail of a
# sequence, large ones need fewer mappings and system calls. On CPU mapping costs the same 4 us for
# 64 KiB as for 2 MiB and reading scattered 64 KiB blocks is within 5% of reading one dense array,
# so the defaults are small. The fused layout maps one block a step where the per-layer layout maps
# 2 * num_layers, therefore it can afford the larger one.
FUSED_TARGET_BYTES = 128 * 1024
PER_LAYER_TARGET_BYTES = 64 * 1024
MIN_DEFAULT_BLOCK_TOKENS = 32
# Kernels walk a block in steps of this many tokens.
TOKEN_MULTIPLE = 16
# Where blocks may be padded up to the granule (fused, quantized), sizes without padding are
# preferred as long as they need no more than this many times the tokens that the target asks for.
MAX_GROWTH_AGAINST_PADDING = 4
MAX_INT32 = 2**31 - 1


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


def choose_block_tokens(
    spec: "CacheSpec",
    granule: int,
    token_bytes: int,
    unit: int,
    may_pad: bool,
    capacity: int | None,
) -> int:
    """The tokens of a block for a spec that leaves them open.

    Args:
        spec: layout and granule are set.
        granule: the spec's.
        token_bytes: bytes of one token in one block.
        unit: multiples of this many tokens fill whole granules.
        may_pad: whether a block may be another multiple of 16 tokens, and padded.
        capacity: bytes of physical memory, for which blocks are made so large that the pool needs
            no more than its share of the process's mappings; None where mappings do not matter.
    """
    fused = spec.layout == "fused"
    target = max(FUSED_TARGET_BYTES if fused else PER_LAYER_TARGET_BYTES, granule)
    wanted = max(MIN_DEFAULT_BLOCK_TOKENS, -(-target // token_bytes))
    # A block larger than the longest sequence would only be padding.
    wanted = min(wanted, round_up(spec.max_seq_len, TOKEN_MULTIPLE))
    tokens = round_up(wanted, unit)
    if may_pad and tokens > MAX_GROWTH_AGAINST_PADDING * wanted:
        # Padding is unavoidable; take as many tokens as the granules hold.
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
    """The most mappings that a pool with such blocks and this capacity may come to need."""
    spec = dataclasses.replace(spec, block_tokens=block_tokens)
    blocks = capacity // spec.block_bytes
    return _native.worst_mappings(blocks, spec.max_slots * spec.num_ranges, spec.blocks_per_range)
