"""Converts the lists that host verbs pass to `edit_slots` to integer arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["edit_rows", "unshared_tokens"]


def edit_rows(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    """Pads rows with -1 to a power of two, so that few programs are compiled."""
    size = 1 << (len(rows) - 1).bit_length() if rows else 0
    table = np.full((size, width), -1, np.int32)
    if rows:
        table[: len(rows)] = rows
    return table


def unshared_tokens(donors: Sequence[int], claim: Any) -> list[tuple[int, int, int, int]]:
    """The copies that complete forks: the tokens in blocks that are not shared.

    Args:
        donors: for each slot of the claim, the slot that it is forked from; negative for none.
        claim: a claim of the native pool, with slots, tokens and shared tokens.

    Returns:
        Copies as `Queue.run` takes them.
    """
    return [
        (donor, slot, shared, tokens - shared)
        for donor, slot, tokens, shared in zip(
            donors, claim.slots, claim.tokens, claim.shared, strict=True
        )
        if donor >= 0 and tokens > shared
    ]
