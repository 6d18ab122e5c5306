"""Batching rules: ops that change the cache get more sequences, ops that only read it are looped.

One cache serves all elements of a vmapped axis. Their batches are concatenated into one ragged
batch with more sequences. A batched cache would be several caches, which one pool cannot provide.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_kvpage._values import raise_all

__all__ = [
    "CACHE",
    "axis_size",
    "flatten_rows",
    "fold",
    "front",
    "map_reader",
    "merge_rows",
    "must_be_mapped",
    "never_mapped",
    "refuse",
    "register",
    "split_rows",
]

Dims = Sequence[int | None]
Rule = Callable[..., tuple[Sequence[Any], Sequence[int | None]]]


def register(primitive: Primitive, rule: Rule) -> None:
    """Registers a batching rule `rule(operands, dims, **params) -> (results, dims)`."""
    batching.primitive_batchers[primitive] = rule


def axis_size(operands: Sequence[Any], dims: Dims) -> int:
    """Size of the mapped axis."""
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def front(operand: Any, dim: int | None, size: int) -> jax.Array:
    """Moves the mapped axis to the front, or repeats the operand if it is not mapped."""
    if dim is None:
        return jnp.broadcast_to(operand, (size, *jnp.shape(operand)))
    return jnp.moveaxis(operand, dim, 0)


def refuse(
    op: str, names: Sequence[str], dims: Dims, wrong: Callable[[str, int | None], str]
) -> None:
    """Raises one error for all operands that are mapped, or unmapped, in an unsupported way.

    Args:
        op: op name for the message.
        names: operand names.
        dims: mapped axis of each operand, or None.
        wrong: returns the problem with an operand, given (name, dim), or "".

    Raises:
        ValueError: lists all problems.
    """
    found = [text for name, dim in zip(names, dims, strict=True) if (text := wrong(name, dim))]
    # The arrays of one cache are batched together: report them once.
    reasons = dict.fromkeys(found)
    raise_all(f"vmap of {op}", reasons)


# Names of a cache's arrays among the operands of an op.
CACHE = ("cache.handle", "cache.epoch", "cache.lengths")


def never_mapped(name: str, dim: int | None) -> str:
    """For `refuse`: a cache and a layer are shared by all elements."""
    if dim is None or name not in (*CACHE, "layer"):
        return ""
    what = "the layer" if name == "layer" else "the cache"
    text = f"{what} is batched, but must be the same for all elements (in_axes=None)"
    if name in CACHE:
        text += (
            "; a cache comes back batched from lax.cond or lax.switch with a batched predicate: "
            "run the op for every element and leave sequences out with batch.mask(keep) instead"
        )
    return text


def must_be_mapped(*own: str) -> Callable[[str, int | None], str]:
    """For `refuse` in ops that change the cache: each element needs separate slots."""

    def wrong(name: str, dim: int | None) -> str:
        if name in own and dim is None:
            return (
                f"{name} is not batched but other arguments are: every element would change the "
                "same slots; give each element slots of its own"
            )
        return never_mapped(name, dim)

    return wrong


# A single program even under an eager vmap, so that no scalar has to be moved to the device.
@functools.partial(jax.jit, static_argnames="tokens", inline=True)
def fold(slots: jax.Array, offsets: jax.Array, tokens: int | None) -> tuple[jax.Array, jax.Array]:
    """Concatenates the batches of all elements.

    Args:
        slots: int32[B, S].
        offsets: int32[B, S+1].
        tokens: T if the elements' token axes are concatenated too; each element then gets one more
            sequence, with slot -1, that owns its padding tokens. None if only the token counts
            matter.

    Returns:
        slots int32[B * S'] and offsets int32[B * S' + 1], where S' = S + 1, or S without tokens.
    """
    size, _ = slots.shape
    last = offsets[:, -1]
    if tokens is None:
        begin = jnp.cumsum(last) - last
        end = jnp.sum(last)[None]
        folded = (begin[:, None] + offsets[:, :-1]).reshape(-1)
    else:
        begin = tokens * jnp.arange(size, dtype=jnp.int32)
        end = jnp.full((1,), size * tokens, jnp.int32)
        folded = (begin[:, None] + offsets).reshape(-1)
        slots = jnp.concatenate([slots, jnp.full((size, 1), -1, jnp.int32)], axis=1)
    # Offsets of a later element that do not begin at 0 would look like padding of the previous one;
    # pass the mistake on to the check at run time.
    first = jnp.where(jnp.all(offsets[:, :1] == 0), 0, -1)[None]
    folded = jnp.concatenate([first[: folded.shape[0]], folded[1:]])
    return slots.reshape(-1), jnp.concatenate([folded, end]).astype(jnp.int32)


def flatten_rows(operands: Sequence[Any], dims: Dims, size: int) -> list[jax.Array]:
    """[B, n, ...] -> [B * n, ...] for each operand, repeated first where it is not mapped."""
    return [merge_rows(front(x, d, size)) for x, d in zip(operands, dims, strict=True)]


def merge_rows(array: jax.Array) -> jax.Array:
    """[B, n, ...] -> [B * n, ...]."""
    return array.reshape(-1, *array.shape[2:])


def split_rows(array: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[B * n, ...] -> [B, n, ...]; n cannot be found from the array if B is 0."""
    return array.reshape(*shape, *array.shape[1:])


def map_reader(op: str, names: Sequence[str], call: Callable[..., Sequence[Any]]) -> Any:
    """Returns the batching rule of a read-only op: one call after the other.

    Args:
        op: op name for messages.
        names: operand names.
        call: runs one element, `call(*operands, **params)`.
    """

    def rule(operands: Sequence[Any], dims: Dims, **params: Any) -> Any:
        refuse(op, names, dims, never_mapped)
        size = axis_size(operands, dims)
        mapped = [front(x, d, size) for x, d in zip(operands, dims, strict=True) if d is not None]

        def element(values: Sequence[Any]) -> Sequence[Any]:
            rest = iter(values)
            chosen = [x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)]
            return call(*chosen, **params)

        results = jax.lax.map(element, mapped)
        return results, [0] * len(results)

    return rule
