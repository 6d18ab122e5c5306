"""Selects the rows of a step that need logits for verifying guesses or scoring a prompt."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_kvpage._compat import gathered
from jax_kvpage.cache import Batch

__all__ = ["VerifiedBatch", "places_behind"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VerifiedBatch(Batch):
    """A batch whose `last_rows` are the rows of all tokens that need logits.

    Attributes:
        rows: int32[S * (K + 1)] or int32[T]: replica-local rows if the batch has a part for each
            replica.
    """

    rows: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    @property
    def last_rows(self) -> jax.Array:
        """`rows`, as indices into all parts."""
        assert self.rows is not None
        assert self.num_tokens is not None
        parts = self.query_offsets.shape[0] - self.slots.shape[0]
        if parts == 1:
            return self.rows
        begins = self.num_tokens * jnp.arange(parts, dtype=jnp.int32)[:, None]
        return (gathered(self.rows).reshape(parts, -1) + begins).reshape(-1)


def places_behind(guesses: jax.Array, most: int) -> jax.Array:
    """Returns how far each token that needs logits is before its sequence's last one.

    Args:
        guesses: int32[S]: number of guesses of each sequence.
        most: K, or 0 in a step that verifies nothing.

    Returns:
        int32[S, most + 1].
    """
    if not most:
        return jnp.zeros((guesses.shape[0], 1), jnp.int32)
    return jnp.maximum(guesses[:, None] - jnp.arange(most + 1)[None], 0)
