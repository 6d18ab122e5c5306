"""KVCache and Batch: the two small pytrees that programs carry.

Neither holds any K or V. A `KVCache` names a pool and the state of its slots; a `Batch` says which
slots the new tokens of one step belong to. Both are registered dataclasses and pass through jit,
scan, while, cond and donation like any other pytree.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import as_host_array, as_int32, host_int, to_device
from jax_kvpage._compat import gathered
from jax_kvpage._padding import (
    as_mask,
    last_rows,
    last_rows_of_parts,
    left_starts,
    right_starts,
    runs,
    too_many_rows,
)
from jax_kvpage._values import raise_all
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["Batch", "KVCache"]


def _is_host(values: Any) -> bool:
    """Whether values are a NumPy array, or a list of host values."""
    if isinstance(values, (list, tuple)):
        return not any(isinstance(value, jax.Array) for value in values)
    return isinstance(values, np.ndarray)


# These are jitted so that an eager call does not transfer scalars to the device, which transfer
# guards would refuse.
@functools.partial(jax.jit, inline=True)
def _offsets(counts: jax.Array) -> jax.Array:
    # Not a concatenation with zeros: that array would be on another device.
    return jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))


@functools.partial(jax.jit, inline=True)
def _last_rows(offsets: jax.Array) -> jax.Array:
    return jnp.where(jnp.diff(offsets) > 0, offsets[1:] - 1, 0)


@functools.partial(jax.jit, inline=True)
def _masked(keep: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.where(keep, slots, -1)


def _one_axis(name: str, values: jax.Array) -> jax.Array:
    if values.ndim != 1 or (values.size and not jnp.issubdtype(values.dtype, jnp.integer)):
        got = f"{values.dtype}{list(values.shape)}"
        raise ValueError(f"{name}: wanted int32[S], an element for each sequence, got {got}")
    return values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A pool's cache as programs see it. `KVPool.cache` makes one, ops return the next.

    Attributes:
        handle: int32[2], the pool's id and generation.
        epoch: uint32[1], incremented by every op that changes the cache; the data dependence that
            keeps reads and writes in order.
        lengths: int32[max_slots], tokens already in each slot; -1 marks a free slot.
            Over a mesh, each of these arrays is the concatenation of one part for each device, and
            `jax.shard_map` with in_specs `PartitionSpec(axis)` gives each device its part.
        spec: the resolved spec, static.
        sharding: how heads or sequences are split over a mesh, static; None if the pool is on one
            device.
    """

    handle: jax.Array
    epoch: jax.Array
    lengths: jax.Array
    spec: CacheSpec = dataclasses.field(metadata={"static": True})
    sharding: AxisSharding | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A ragged batch of new tokens: sequence s owns tokens query_offsets[s]:query_offsets[s+1].

    The token axis of q, k and v has a static length T; tokens from query_offsets[-1] on are
    padding. Sequences with slot -1 are padding too: nothing is written for them, and their output
    is 0.

    T is the leading dimension of q, so a batch need not contain it. If it does (`num_tokens`), ops
    check it against q, and `positions` need not be given it. It is never inferred from the offsets,
    which are not known while jit traces.

    A padded batch (`Batch.padded`, `Batch.from_mask`) is for models whose activations are
    [S, T, heads, dim], a row of T tokens for each sequence: append_kv, paged_attention and
    update_and_attend take and return such arrays, positions is int32[S, T], and query_offsets only
    counts the new tokens of each sequence. Padding in a row is neither written nor attended to, and
    its output is 0.

    Attributes:
        slots: int32[S], slot of each sequence, or -1.
        query_offsets: int32[S+1], non-decreasing from 0.
        num_tokens: T, static, or None if not given.
        starts: int32[S], where the new tokens of each sequence begin on axis T of a padded batch;
            None if the tokens are packed.
    """

    slots: jax.Array
    query_offsets: jax.Array
    num_tokens: int | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )
    starts: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Converts host integers to arrays."""
        for name in ("slots", "query_offsets", "starts"):
            value = getattr(self, name)
            # Tree functions put arbitrary objects in these fields: leave those alone.
            if type(value) in (list, tuple, range, np.ndarray):
                object.__setattr__(self, name, as_int32(f"Batch.{name}", value))
        if self.num_tokens is not None:
            tokens = host_int("Batch.num_tokens", self.num_tokens, low=0)
            object.__setattr__(self, "num_tokens", tokens)
        elif self.starts is not None:
            raise ValueError("Batch: starts: a padded batch needs num_tokens, the length of a row")

    @classmethod
    def decode(cls, slots: jax.Array | Sequence[int]) -> "Batch":
        """A batch for a decode step: one new token for each slot, T == S.

        Args:
            slots: int32[S], or a list of ints; -1 is padding.

        Raises:
            ValueError: slots that are not integers, or not one-dimensional.
        """
        slots = _one_axis("Batch.decode: slots", as_int32("Batch.decode: slots", slots))
        known = isinstance(slots.shape[0], int)  # jax.export may have symbolic shapes
        offsets = (np if known else jnp).arange(slots.shape[0] + 1, dtype=np.int32)
        return cls(slots, to_device(offsets), num_tokens=slots.shape[0] if known else None)

    @classmethod
    def from_lengths(
        cls,
        slots: jax.Array | Sequence[int],
        lengths: jax.Array | Sequence[int],
        *,
        num_tokens: int | None = None,
    ) -> "Batch":
        """A batch in which sequence s has lengths[s] new tokens, all packed without padding.

        Args:
            slots: int32[S], or a list of ints; -1 is padding.
            lengths: int32[S], or a list of ints, none negative.
            num_tokens: T, the length of the token axis, at least the sum of lengths. If it is None
                and lengths are host integers, T is their sum.

        Raises:
            ValueError: lengths that are not integers or do not match slots; host lengths that are
                negative or whose sum is more than num_tokens.
        """
        slots = as_int32("Batch.from_lengths: slots", slots)
        counts = as_host_array("Batch.from_lengths: lengths", lengths)
        known = isinstance(counts, np.ndarray)
        if num_tokens is not None:
            num_tokens = host_int("Batch.from_lengths: num_tokens", num_tokens, low=0)
        reasons = []
        if counts.ndim != 1 or counts.shape != slots.shape:
            reasons.append(f"slots {slots.shape} and lengths {counts.shape} do not match")
        if counts.size and not jnp.issubdtype(counts.dtype, jnp.integer):
            reasons.append(f"lengths must be integers, got {counts.dtype}")
        if known and counts.size and counts.min() < 0:
            reasons.append(f"lengths must not be negative, got {counts.min()}")
        if known and num_tokens is not None and counts.sum() > num_tokens:
            reasons.append(f"lengths sum to {counts.sum()}, more than num_tokens={num_tokens}")
        raise_all("Batch.from_lengths", reasons)
        if known:
            num_tokens = int(counts.sum()) if num_tokens is None else num_tokens
            ends = np.cumsum([0, *counts], dtype=np.int64)
            offsets = as_int32("Batch.from_lengths: sum of lengths", ends)
            return cls(slots, offsets, num_tokens=num_tokens)
        return cls(slots, _offsets(gathered(counts)), num_tokens=num_tokens)

    @classmethod
    def padded(
        cls,
        slots: jax.Array | Sequence[int],
        lengths: jax.Array | Sequence[int],
        num_tokens: int,
        side: Literal["left", "right"] = "left",
    ) -> "Batch":
        """A batch for activations [S, T, heads, dim] whose rows are padded to one length.

        Args:
            slots: int32[S], or a list of ints; -1 is padding.
            lengths: int32[S], or a list of ints: new tokens of each sequence, from 0 to T. Traced
                lengths are checked when the program runs.
            num_tokens: T, the length of a row.
            side: where the padding is: "left" (each row ends with the last token of its sequence,
                as in Hugging Face's generation) or "right".

        Raises:
            ValueError: another side; lengths that are not integers or do not match slots; host
                lengths that are negative or more than num_tokens.
        """
        op = "Batch.padded"
        if side not in ("left", "right"):
            raise ValueError(f"{op}: side: wanted 'left' or 'right', got {side!r}")
        tokens = host_int(f"{op}: num_tokens", num_tokens, low=0)
        slots = as_int32(f"{op}: slots", slots)
        counts = as_host_array(f"{op}: lengths", lengths)
        reasons = []
        if counts.ndim != 1 or counts.shape != slots.shape:
            reasons.append(f"slots {slots.shape} and lengths {counts.shape} do not match")
        if counts.size and not jnp.issubdtype(counts.dtype, jnp.integer):
            reasons.append(f"lengths must be integers, got {counts.dtype}")
        elif isinstance(counts, np.ndarray) and counts.size:
            low, high = counts.min(), counts.max()
            if low < 0 or high > tokens:
                wrong = low if low < 0 else high
                reasons.append(f"lengths must be from 0 to num_tokens={tokens}, got {wrong}")
        raise_all(op, [*reasons, *too_many_rows(counts.shape, tokens)])
        # Before anything is computed with them: narrower integers would wrap around.
        counts = gathered(to_device(counts)).astype(jnp.int32)
        starts = left_starts(counts, tokens) if side == "left" else right_starts(counts)
        return cls(slots, _offsets(counts), num_tokens=tokens, starts=starts)

    @classmethod
    def from_mask(cls, slots: jax.Array | Sequence[int], mask: Any) -> "Batch":
        """A padded batch whose new tokens are where a mask is set.

        The mask covers the new tokens only: one that also covers tokens in the cache, such as
        Hugging Face's attention_mask after the first step, must be cut to its last T columns.

        Args:
            slots: int32[S], or a list of ints; -1 is padding.
            mask: [S, T], bool or integers 0 and 1, an array or nested lists. The tokens of a row
                must be contiguous; a row may be empty.

        Raises:
            ValueError: another shape or dtype; a gap in a row of a mask that the host knows. With a
                traced mask, a gap makes the ops fail at run time, like malformed query_offsets.
        """
        op = "Batch.from_mask"
        slots = _one_axis(f"{op}: slots", as_int32(f"{op}: slots", slots))
        mask = as_mask(f"{op}: mask", mask, slots.shape[0])
        raise_all(op, too_many_rows(slots.shape, mask.shape[1]))
        starts, offsets = runs(gathered(mask))
        return cls(slots, offsets, num_tokens=mask.shape[1], starts=starts)

    @property
    def last_rows(self) -> jax.Array:
        """int32[S], the row of each sequence's last new token: `logits[batch.last_rows]`.

        0 for a sequence without new tokens, so that the index is always valid if there are any
        tokens. A masked sequence keeps its row; `slots` tells which sequences are active. For a
        padded batch these are rows of the activations as [S * T, ...]:
        `logits.reshape(-1, vocabulary)[batch.last_rows]`.

        Raises:
            ValueError: query_offsets that are not integers, or not one-dimensional.
        """
        name = "Batch.last_rows: query_offsets"
        offsets = gathered(_one_axis(name, as_int32(name, self.query_offsets)))
        parts = offsets.shape[0] - np.size(self.slots)
        if parts > 1:  # one for each replica of a pool: `spread`
            return last_rows_of_parts(self.starts, offsets, self.num_tokens, parts)
        if self.starts is None:
            return _last_rows(offsets)
        assert self.num_tokens is not None
        return last_rows(gathered(self.starts), offsets, self.num_tokens)

    def mask(self, keep: jax.Array) -> "Batch":
        """The same batch with only some of its sequences active; the others become padding.

        Shapes do not change, so a compiled program can leave out sequences that have stopped or
        that could not get memory: `batch.mask(active & ok)`.

        Args:
            keep: bool[S].

        Raises:
            ValueError: keep has another shape or dtype.
        """
        try:
            keep = to_device(np.asarray(keep)) if _is_host(keep) else jnp.asarray(keep)
        except TypeError as error:
            raise ValueError(f"Batch.mask: keep: wanted bool[S], got {keep!r}") from error
        if keep.shape != jnp.shape(self.slots) or keep.dtype != jnp.bool_:
            raise ValueError(
                f"Batch.mask: keep: wanted bool{list(jnp.shape(self.slots))} (one for each "
                f"sequence), got {keep.dtype}{list(keep.shape)}"
            )
        slots = _masked(gathered(keep), gathered(as_int32("Batch.mask: slots", self.slots)))
        return dataclasses.replace(self, slots=slots)
