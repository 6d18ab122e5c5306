"""Collects all mistakes in an op's arguments, so that one ValueError can list them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _compat
from jax_kvpage._arrays import as_int32
from jax_kvpage._values import is_integer, raise_all
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.spec import CacheSpec

__all__ = [
    "EPOCH",
    "FLOATS",
    "INT32",
    "Checker",
    "batch_operands",
    "cache_operands",
    "check_arrays",
    "check_num_tokens",
    "layer_operand",
    "misplaced",
    "pool_checker",
    "results",
    "show",
]

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
INT32 = (jnp.int32,)

# Shape and dtype of an epoch, a result of every op that changes a cache.
EPOCH = ((1,), jnp.uint32)

# A dimension: a number, a name that is bound at its first use, or a name plus one.
Dim = int | str


class Checker:
    """Compares abstract values with the requirements of an op and records all differences.

    Dimensions are named: the first array that uses a name sets its value, later ones must agree,
    and messages show both the name and the number.
    """

    def __init__(self, op: str, problems: Sequence[str] = (), **dims: int) -> None:
        self.op = op
        self.problems = list(problems)
        self.dims: dict[str, int] = dict(dims)

    def add(self, problem: str) -> None:
        """Records a mistake."""
        self.problems.append(problem)

    def _size(self, dim: Dim) -> int | None:
        if isinstance(dim, int):
            return dim
        name, plus, _ = dim.partition("+")
        size = self.dims.get(name)
        return size + 1 if plus and size is not None else size

    def array(self, name: str, aval: Any, dims: Sequence[Dim], dtypes: Sequence[Any]) -> None:
        """Checks the dtype, rank and dimensions of an array.

        Args:
            name: argument name.
            aval: abstract value (`jax.typeof`).
            dims: required dimensions.
            dtypes: allowed dtypes.
        """
        right = any(aval.dtype == np.dtype(dtype) for dtype in dtypes)
        right = right and len(aval.shape) == len(dims)
        if len(aval.shape) == len(dims):
            for dim, actual in zip(dims, aval.shape, strict=True):
                if isinstance(dim, str) and self._size(dim) is None and not dim.endswith("+1"):
                    self.dims[dim] = actual
                right = right and self._size(dim) in (None, actual)
        if not right:
            types = " or ".join(np.dtype(dtype).name for dtype in dtypes)
            wanted = ", ".join(map(self._show, dims))
            self.add(f"{name}: wanted {types} [{wanted}], got {show(aval)}")

    def _show(self, dim: Dim) -> str:
        size = self._size(dim)
        return str(dim) if size is None or isinstance(dim, int) else f"{dim}={size}"

    def cache(self, handle: Any, epoch: Any, lengths: Any) -> None:
        """Checks the arrays of a KVCache."""
        self.array("cache.handle", handle, (2,), INT32)
        self.array("cache.epoch", epoch, (1,), (jnp.uint32,))
        self.array("cache.lengths", lengths, ("max_slots",), INT32)

    def batch(self, slots: Any, query_offsets: Any) -> None:
        """Checks the arrays of a Batch and binds S."""
        self.array("batch.slots", slots, ("S",), INT32)
        self.array("batch.query_offsets", query_offsets, ("S+1",), INT32)

    def done(self) -> None:
        """Raises the collected mistakes.

        Raises:
            ValueError: there was at least one mistake.
        """
        raise_all(self.op, self.problems)


def pool_checker(op: str, spec: CacheSpec, problems: Sequence[str] = ()) -> Checker:
    """Returns a checker that knows the dimensions of a spec."""
    return Checker(op, problems, max_slots=spec.max_slots, Hkv=spec.num_kv_heads, D=spec.head_dim)


def results(operands: Sequence[Any], *kinds: tuple[Sequence[int], Any]) -> list[Any]:
    """Returns abstract values of results that depend on all operands, given by shape and dtype."""
    return [_compat.result_aval(operands, shape, dtype) for shape, dtype in kinds]


def show(aval: Any) -> str:
    """dtype[shape] of an abstract value."""
    return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"


# The order of arguments differs: arrays that attention reads come before the cache.
_SIGNATURES = {
    "append_kv": "append_kv(cache, k, v, batch, *, layer)",
    "paged_attention": "paged_attention(q, cache, batch, *, layer)",
    "update_and_attend": "update_and_attend(q, k, v, cache, batch, *, layer)",
    "advance": "advance(cache, batch)",
    "grow": "grow(cache, batch)",
    "positions": "positions(cache, batch)",
    "read_kv": "read_kv(cache, batch_or_slots, layer)",
    "map_slots": "map_slots(cache, slots, num_tokens)",
    "set_lengths": "set_lengths(cache, slots, lengths)",
    "after": "after(cache, value)",
    "paged_attention_with_tables": (
        "paged_attention_with_tables(q, k_pages, v_pages, block_tables, lengths)"
    ),
}


def misplaced(op: str, name: str, wanted: str, value: Any) -> ValueError:
    array = isinstance(value, (jax.Array, np.ndarray))
    got = f"an array {show(value)}" if array else type(value).__name__
    signature = _SIGNATURES.get(op)
    order = f"; the arguments are {signature}" if signature else ""
    return ValueError(f"{op}: {name}: wanted {wanted}, got {got}{order}")


def check_arrays(op: str, **arguments: Any) -> None:
    """Refuses a cache, a batch or anything else that is not an array.

    Args:
        op: op name for messages.
        **arguments: values by argument name.

    Raises:
        ValueError: an argument is not an array; the message shows the signature.
    """
    for name, value in arguments.items():
        number = isinstance(value, (jax.Array, np.ndarray, np.generic, int, float))
        if not number and not hasattr(value, "__jax_array__"):
            raise misplaced(op, name, "an array", value)


def cache_operands(op: str, cache: KVCache) -> tuple[Any, Any, Any]:
    """Returns the arrays of a cache, in the order of every primitive's operands.

    Raises:
        ValueError: not a KVCache, or its leaves are not arrays.
    """
    if not isinstance(cache, KVCache):
        wanted = "a KVCache (from pool.cache())"
        raise misplaced(op, "cache", wanted, cache)
    arrays = (cache.handle, cache.epoch, cache.lengths)
    _check_arrays(op, "cache", arrays)
    return arrays


def batch_operands(op: str, batch: Batch) -> tuple[Any, Any]:
    """Returns the arrays of a batch.

    Raises:
        ValueError: not a Batch, or its leaves are not arrays.
    """
    if not isinstance(batch, Batch):
        wanted = (
            "a Batch (Batch(slots, query_offsets), Batch.decode(slots), "
            "Batch.from_lengths(slots, lengths))"
        )
        raise misplaced(op, "batch", wanted, batch)
    arrays = (batch.slots, batch.query_offsets)
    _check_arrays(op, "batch", arrays)
    slots, offsets = (as_int32(f"{op}: batch", array) for array in arrays)
    return slots, offsets


def _check_arrays(op: str, name: str, arrays: Sequence[Any]) -> None:
    for array in arrays:
        if not isinstance(array, (jax.Array, np.ndarray)):
            raise ValueError(
                f"{op}: {name}: wanted arrays, got {type(array).__name__} (jax.eval_shape, and "
                "jax.tree.map of a function that returns something else, give no arrays)"
            )


def layer_operand(layer: Any, spec: CacheSpec, problems: list[str]) -> Any:
    """Returns the layer as an int32 scalar; a Python int is range-checked here.

    Args:
        layer: int, or int32 scalar (traced layers are checked at run time).
        spec: spec of the cache.
        problems: list to which a mistake is added.
    """
    if is_integer(layer):
        if not 0 <= layer < spec.num_layers:
            last = spec.num_layers - 1
            problems.append(f"layer: wanted 0 to {last}, the spec has {last + 1}, got {layer}")
            layer = 0
        return np.int32(layer)
    return as_int32("layer", layer)


def check_num_tokens(batch: Batch, actual: Any, name: str, problems: list[str]) -> None:
    """Checks that the token axis of an array matches `batch.num_tokens`, if that is known."""
    shape = np.shape(actual)
    if batch.num_tokens is not None and shape and shape[0] != batch.num_tokens:
        problems.append(
            f"{name}: has {shape[0]} tokens, but batch.num_tokens is {batch.num_tokens} (padding "
            "counts: num_tokens is the length of the token axis)"
        )
