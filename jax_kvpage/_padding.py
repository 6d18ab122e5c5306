"""Converts padded batches, with a row of T tokens for each sequence, to ragged batches.

The activations [S, T, ...] of a padded batch are treated as S * T tokens on one axis. The padding
between the new tokens of two sequences belongs to an extra sequence with slot -1, so ops need no
copies, and kernels need not know about padding.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import to_device
from jax_kvpage._values import MAX_INT32

__all__ = [
    "as_mask",
    "last_rows",
    "last_rows_of_parts",
    "left_starts",
    "right_starts",
    "runs",
    "too_many_rows",
    "with_padding",
]


# Each function is jitted, so that an eager call does not transfer scalars to the device, which
# transfer guards would refuse.


@functools.partial(jax.jit, static_argnums=3, inline=True)
def with_padding(
    slots: jax.Array, offsets: jax.Array, starts: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Converts a padded batch to a ragged batch over S * T tokens.

    Args:
        slots: int32[S].
        offsets: int32[S+1], from 0; their differences are the numbers of new tokens.
        starts: int32[S], where the tokens of each sequence begin in its row.
        tokens: T.

    Returns:
        slots int32[2 * S] and offsets int32[2 * S + 1]; each sequence is preceded by one with slot
        -1 that owns the padding. If the operands are malformed or a sequence does not fit in its
        row, the first offset is -1, which every op refuses at run time.
    """
    size = slots.shape[0]
    ends = starts + jnp.diff(offsets)
    right = (starts >= 0) & (ends >= starts) & (ends <= tokens)
    first = jnp.where(jnp.all(right) & (offsets[0] == 0), 0, -1).astype(jnp.int32)
    rows = tokens * jnp.arange(size, dtype=jnp.int32)
    bounds = jnp.stack([rows + starts, rows + ends], axis=1).reshape(-1)
    padding = jnp.full((size,), -1, jnp.int32)
    slots = jnp.stack([padding, slots], axis=1).reshape(-1)
    return slots, jnp.concatenate([first[None], bounds.astype(jnp.int32)])


@functools.partial(jax.jit, static_argnums=2, inline=True)
def last_rows(starts: jax.Array, offsets: jax.Array, tokens: int) -> jax.Array:
    """int32[S], the row among S * T of each sequence's last new token; 0 if it has none."""
    counts = jnp.diff(offsets)
    rows = tokens * jnp.arange(starts.shape[0], dtype=jnp.int32)
    return jnp.where(counts > 0, rows + starts + counts - 1, 0)


def last_rows_of_parts(
    starts: jax.Array | None, offsets: jax.Array, tokens: int | None, parts: int
) -> jax.Array:
    """Like `last_rows`, for a batch with a part for each replica.

    Args:
        starts: int32[S] for a padded batch; None if the tokens of each part are packed.
        offsets: int32[S + parts], the offsets of all parts, one part after the other.
        tokens: T of each row, or of each part if the tokens are packed.
        parts: number of parts.

    Raises:
        ValueError: `tokens` is None.
    """
    if tokens is None:
        raise ValueError(
            f"Batch.last_rows: a batch with {parts} parts needs num_tokens, the rows of each part"
        )
    split = offsets.reshape(parts, -1)
    if starts is not None:
        counts = jnp.diff(split, axis=1).reshape(-1)
        rows = tokens * jnp.arange(starts.shape[0], dtype=jnp.int32)
        return jnp.where(counts > 0, rows + starts + counts - 1, 0)
    begins = tokens * jnp.arange(parts, dtype=jnp.int32)[:, None]
    return jnp.where(jnp.diff(split, axis=1) > 0, begins + split[:, 1:] - 1, 0).reshape(-1)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def left_starts(counts: jax.Array, tokens: int) -> jax.Array:
    """Where the tokens of each row begin if the padding is on the left."""
    return (tokens - counts).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)
def right_starts(counts: jax.Array) -> jax.Array:
    """Where the tokens of each row begin if the padding is on the right."""
    return jnp.zeros_like(counts, jnp.int32)


@functools.partial(jax.jit, inline=True)
def runs(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the tokens of each row of a mask begin, and the offsets.

    Args:
        mask: bool[S, T].

    Returns:
        starts int32[S] and offsets int32[S+1]; the first offset is -1 if a row has a gap, else 0.
    """
    counts = mask.sum(axis=1, dtype=jnp.int32)
    # argmax returns the first maximum; a column is added for rows without columns (T = 0).
    starts = jnp.argmax(jnp.pad(mask, ((0, 0), (0, 1))), axis=1).astype(jnp.int32)
    begins = mask & jnp.pad(~mask, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    gaps = jnp.any(begins.sum(axis=1) > 1)
    offsets = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    return starts, offsets - jnp.pad(gaps.astype(jnp.int32)[None], (0, counts.shape[0]))


@functools.partial(jax.jit, inline=True)
def _as_bools(mask: jax.Array) -> jax.Array:
    return mask != jnp.zeros_like(mask)


def as_mask(name: str, mask: Any, sequences: int) -> jax.Array:
    """Converts a mask to bool[S, T]; if the host knows its values, checks it for gaps.

    Args:
        name: what to call it in an error.
        mask: bools or integers, an array or nested lists.
        sequences: S.

    Raises:
        ValueError: another shape or dtype, or a gap.
    """
    wanted = f"{name}: wanted bool[{sequences}, T] (or integers 0 and 1)"
    if not isinstance(mask, jax.Array):
        try:
            mask = np.asarray(mask)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{wanted}, got {mask!r}") from error
        if mask.size == 0:  # NumPy makes [[], []] an array of floats
            mask = mask.astype(np.bool_)
    right = mask.dtype == np.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)
    if not right or mask.ndim != 2 or mask.shape[0] != sequences:
        raise ValueError(f"{wanted}, got {mask.dtype}{list(mask.shape)}")
    if not isinstance(mask, jax.core.Tracer):
        known = np.asarray(jax.device_get(mask))
        if not np.isin(known, (0, 1)).all():
            raise ValueError(f"{wanted}, got other integers")
        begins = np.diff(known.astype(np.int8), axis=1, prepend=0) == 1
        for row in np.flatnonzero(begins.sum(axis=1) > 1)[:1]:
            text = np.array2string(known[row].astype(int), separator="", threshold=80)
            raise ValueError(
                f"{name}: the tokens of row {row} have a gap, {text}: padding must be to the left "
                "or to the right of them"
            )
    return _as_bools(to_device(mask))


def too_many_rows(sequences: Sequence[int], tokens: int) -> list[str]:
    """An error message if a batch has more rows of tokens than int32 can count, else nothing."""
    rows = math.prod(sequences) * tokens
    if rows <= MAX_INT32:
        return []
    return [f"{rows} rows of tokens in all, at most {MAX_INT32} are possible"]
