"""Padded batches: rows of T tokens for each sequence, and the same tokens as a ragged batch.

The activations [S, T, ...] of a padded batch are S * T tokens in one axis. Padding between the new
tokens of two sequences belongs to a sequence with slot -1, so ops need neither copies nor programs
and kernels that know of padding.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import to_device

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

_MAX_INT32 = 2**31 - 1

# Each function is one program when called eagerly: then no scalar has to be moved to the device,
# which transfer guards would see.


@functools.partial(jax.jit, static_argnums=3, inline=True)
def with_padding(
    slots: jax.Array, offsets: jax.Array, starts: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The ragged batch over S * T tokens that a padded batch is.

    Args:
        slots: int32[S].
        offsets: int32[S+1]; only their differences matter.
        starts: int32[S].
        tokens: T.

    Returns:
        slots int32[2 * S] and offsets int32[2 * S + 1]; before each sequence one with slot -1 owns
        the padding. The first offset is -1, which every op refuses when it runs, if the operands
        are malformed or a sequence leaves its row.
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
    """int32[S], the row among S * T of each sequence's last new token; 0 where there are none."""
    counts = jnp.diff(offsets)
    rows = tokens * jnp.arange(starts.shape[0], dtype=jnp.int32)
    return jnp.where(counts > 0, rows + starts + counts - 1, 0)


def last_rows_of_parts(
    starts: jax.Array | None, offsets: jax.Array, tokens: int | None, parts: int
) -> jax.Array:
    """int32[S], as above, of a batch with a part for each replica.

    Args:
        starts: int32[S] of a padded batch; None: the tokens of each part are packed.
        offsets: int32[S + parts], those of each part.
        tokens: T of a row, or of a part.
        parts: how many there are.

    Raises:
        ValueError: packed tokens, and nobody says how many a part has.
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
    """Where tokens begin that are padded on the left."""
    return (tokens - counts).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)
def right_starts(counts: jax.Array) -> jax.Array:
    """Where tokens begin that are padded on the right."""
    return jnp.zeros_like(counts, jnp.int32)


@functools.partial(jax.jit, inline=True)
def runs(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the tokens of each row of a mask begin, and offsets.

    Args:
        mask: bool[S, T].

    Returns:
        starts int32[S] and offsets int32[S+1], which begin at -1 if a row has a gap.
    """
    counts = mask.sum(axis=1, dtype=jnp.int32)
    # The first of equal values; a column of padding, because an empty row has no first.
    starts = jnp.argmax(jnp.pad(mask, ((0, 0), (0, 1))), axis=1).astype(jnp.int32)
    begins = mask & jnp.pad(~mask, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    gaps = jnp.any(begins.sum(axis=1) > 1)
    offsets = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    return starts, offsets - jnp.pad(gaps.astype(jnp.int32)[None], (0, counts.shape[0]))


@functools.partial(jax.jit, inline=True)
def _as_bools(mask: jax.Array) -> jax.Array:
    return mask != jnp.zeros_like(mask)


def as_mask(name: str, mask: Any, sequences: int) -> jax.Array:
    """A mask bool[S, T]; one that is known to the host is checked for gaps.

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
    """The mistake of a batch whose rows of tokens int32 cannot count, if any."""
    rows = math.prod(sequences) * tokens
    if rows <= _MAX_INT32:
        return []
    return [f"{rows} rows of tokens in all, at most {_MAX_INT32} are possible"]
