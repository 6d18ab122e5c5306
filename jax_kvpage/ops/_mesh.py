"""Ops on a cache that is sharded over a mesh: each device runs the op on its part.

If the mesh axis is already manual (inside `jax.shard_map`), an op sees one shard of the cache and
works on that. Otherwise the op wraps itself in `jax.shard_map`: the compiler would otherwise gather
q, k and v on every device.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_kvpage._arrays import as_host_array
from jax_kvpage._compat import gathered, placed_as
from jax_kvpage._values import raise_all
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _replicas
from jax_kvpage.ops._kept_faults import raise_kept
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.spec import CacheSpec

__all__ = [
    "attention",
    "attention_and_cache",
    "cache_and_ok",
    "cache_only",
    "everywhere",
    "in_order",
    "keys_and_values",
    "not_striped",
    "over_mesh",
    "refuse",
    "refuse_processes",
]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

# (sharding, arguments by name) -> out_specs of the op's results
OutSpecs = Callable[[AxisSharding, dict[str, Any]], Any]

# (op, sharding, arguments by name) -> the op's results on one device, for a cache whose sequences
# are sharded over the mesh
Striped = Callable[[Callable[..., Any], StripeSharding, dict[str, Any]], Any]

_HEADS = ("q", "k", "v")  # [..., heads, dim]
_PER_HEAD = ("sinks", "alibi_slopes")  # [Hq]


def refuse(op: str, cache: Any, why: str) -> None:
    """Refuses a cache that is sharded over a mesh.

    Raises:
        ValueError: the cache is sharded.
    """
    if isinstance(cache, KVCache) and cache.sharding is not None:
        axes = cache.sharding.axes
        over = f"axis {axes[0]!r} of a mesh" if len(axes) == 1 else f"axes {axes} of a mesh"
        raise ValueError(f"{op}: the cache is spread over {over}: {why}")


def not_striped(op: Callable[..., Any], sharding: StripeSharding, arguments: dict[str, Any]) -> Any:
    """Refuses an op that maps memory, because the cache's sequences are sharded over the mesh.

    If only one device failed there, the others would wait for it in a collective.

    Raises:
        ValueError: always.
    """
    del arguments
    raise ValueError(
        f"{op.__name__}: the cache's sequences are spread over axis {sharding.axis!r} of a mesh, "
        "where programs map no memory: make room on the host before the step runs, with "
        "pool.extend(slots, num_tokens)"
    )


def refuse_processes(op: str, cache: Any) -> None:
    """Refuses a cache whose devices belong to several processes, for an op that maps blocks.

    Raises:
        ValueError: they do.
    """
    if isinstance(cache, KVCache) and cache.sharding and len(cache.sharding.processes) > 1:
        raise ValueError(
            f"{op}: the cache is spread over several processes, and no process knows what the "
            "programs of the others map. Make room on the host before the step runs, in the same "
            "order in all processes, with pool.extend(slots, num_tokens)"
        )


def over_mesh(
    out: OutSpecs,
    *,
    split: Sequence[str] = (),
    replicated: bool = False,
    refused: str = "",
    finish: Callable[[AxisSharding, Any], Any] = lambda sharding, result: result,
    striped: Striped | None = None,
    maps: bool = False,
) -> Callable[[Callable[_Params, _Result]], Callable[_Params, _Result]]:
    """Makes an op work on caches that are sharded over a mesh.

    Args:
        out: returns the sharding of the op's results.
        split: names of arguments that have a part for each device, like the cache.
        replicated: whether all shards compute the same results, which `out` declares as replicated.
        refused: why the op cannot wrap itself; empty if it can.
        finish: converts the results of the shards into the result of the call.
        striped: the op on one device if sequences are sharded; None runs it as if heads were.
        maps: whether the op maps memory, which programs of several processes cannot do.
    """

    def decorate(op: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
        signature = inspect.signature(op)
        rule = _Rule(op, signature, out, tuple(split), replicated, striped)

        @functools.wraps(op)
        def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            found = [value for value in (*args, *kwargs.values()) if isinstance(value, KVCache)]
            if not found or found[0].sharding is None:
                return op(*args, **kwargs)
            sharding, spec = found[0].sharding, found[0].spec
            if maps:
                refuse_processes(op.__name__, found[0])
            bound = signature.bind(*args, **kwargs)
            if sharding.manual:
                result: _Result = _on_shard(rule, bound.arguments)
                return result
            if refused:
                refuse(op.__name__, found[0], refused)
            if isinstance(sharding, HeadSharding):
                _check_heads(op.__name__, spec, sharding, bound.arguments)
                _replicas.check(op.__name__, spec, sharding, bound.arguments, maps)
            arrays, options = _parted(op.__name__, bound.arguments)
            program = _program if _hashable(options) else _program.__wrapped__
            done = program(rule, sharding, options)(arrays)
            if sharding.keeps_faults:
                raise_kept(found[0], done)
            final: _Result = finish(sharding, done)
            return final

        return call

    return decorate


@dataclasses.dataclass(frozen=True)
class _Rule:
    op: Callable[..., Any]
    signature: inspect.Signature
    out: OutSpecs
    split: tuple[str, ...]
    replicated: bool
    striped: Striped | None


def _is_cache(value: Any) -> bool:
    return isinstance(value, KVCache)


def _on_shard(rule: _Rule, arguments: dict[str, Any]) -> Any:
    """Runs the op on this device's part of the cache."""
    cache: KVCache = arguments["cache"]
    assert cache.sharding is not None
    if isinstance(cache.sharding, StripeSharding) and rule.striped is not None:
        return rule.striped(rule.op, cache.sharding, arguments)
    own = dataclasses.replace(cache, spec=cache.sharding.local, sharding=None)
    bound = inspect.BoundArguments(rule.signature, {**arguments, "cache": own})

    def whole(value: Any) -> Any:
        if not _is_cache(value):
            return value
        return dataclasses.replace(value, spec=cache.spec, sharding=cache.sharding)

    return jax.tree.map(whole, rule.op(*bound.args, **bound.kwargs), is_leaf=_is_cache)


def _check_heads(
    op: str, spec: CacheSpec, sharding: HeadSharding, arguments: dict[str, Any]
) -> None:
    """Raises a ValueError for arrays whose head counts do not match the whole cache."""
    reasons, heads = [], spec.num_kv_heads
    for name in _HEADS:
        shape: tuple[int, ...] = np.shape(arguments[name]) if name in arguments else ()
        if len(shape) < 3:
            continue  # the op reports the error
        if name != "q" and shape[-2] != heads:
            reasons.append(
                f"{name}: wanted {heads} key/value heads (outside of jax.shard_map all that the "
                f"cache has), got {list(shape)}"
            )
        if name == "q" and (shape[-2] % heads or shape[-2] % sharding.parts):
            reasons.append(
                f"q: wanted a multiple of the {heads} key/value heads and of the {sharding.parts} "
                f"devices as heads, got {list(shape)}"
            )
    for name in _PER_HEAD:
        shape = np.shape(arguments[name]) if arguments.get(name) is not None else ()
        if shape and shape[0] % sharding.parts:
            reasons.append(
                f"{name}: {shape[0]} heads cannot be split over {sharding.parts} devices"
            )
    raise_all(op, reasons)


def _parted(
    op: str, arguments: dict[str, Any]
) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Splits arguments into arrays and other options."""
    arrays, options = {}, []
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            arrays[name] = as_host_array(f"{op}: {name}", value)
        elif isinstance(value, (KVCache, Batch, jax.Array, np.ndarray)):
            arrays[name] = value
        else:
            options.append((name, value))
    return arrays, tuple(options)


def _hashable(options: Any) -> bool:
    try:
        hash(options)
    except TypeError:
        return False
    return True


def _copies(sharding: AxisSharding) -> int:
    """Number of devices that hold each key/value head if heads are sharded; else 1."""
    return sharding.copies if isinstance(sharding, HeadSharding) else 1


@functools.lru_cache(maxsize=1024)
def _program(rule: _Rule, sharding: AxisSharding, options: tuple[tuple[str, Any], ...]) -> Any:
    """Returns the op over the mesh, as a function of its array arguments."""

    def in_spec(name: str, value: Any) -> PartitionSpec:
        if name == "cache" or name in rule.split:
            return sharding.split
        if name == "q" or (name in ("k", "v") and _copies(sharding) == 1):
            return sharding.heads(np.ndim(value)) if np.ndim(value) > 2 else PartitionSpec()
        if name in ("k", "v") or _replicas.has_parts(name, value):
            return sharding.rows
        return sharding.per_head if name in _PER_HEAD else PartitionSpec()

    def on_shard(arrays: dict[str, Any]) -> Any:
        copies = _copies(sharding)
        if copies > 1:  # the head that this device holds a copy of
            assert sharding.axis is not None
            head = jax.lax.axis_index(sharding.axis) // copies
            for name in {"k", "v"} & arrays.keys():
                arrays[name] = jax.lax.dynamic_slice_in_dim(
                    arrays[name], head, 1, np.ndim(arrays[name]) - 2
                )
        arguments = _replicas.localized(sharding, {**arrays, **dict(options)})
        return _replicas.parts_of(sharding, arguments, _on_shard(rule, arguments))

    def run(arrays: dict[str, Any]) -> Any:
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else sharding.mesh
        leaves, tree = jax.tree.flatten(arrays)
        specs = [
            in_spec(name, arrays[name])
            for name in sorted(arrays)  # the order of leaves
            for _ in jax.tree.leaves(arrays[name])
        ]
        # Shardy in jaxlib 0.11 crashes on an empty operand, so those are created on the shard.
        filled = [i for i, leaf in enumerate(leaves) if np.size(leaf)]

        def on_leaves(*operands: Any) -> Any:
            own = [None if np.size(x) else jnp.zeros(np.shape(x), x.dtype) for x in leaves]
            for i, operand in zip(filled, operands, strict=True):
                own[i] = operand
            return on_shard(jax.tree.unflatten(tree, own))

        mapped = jax.shard_map(
            on_leaves,
            mesh=mesh,
            in_specs=tuple(specs[i] for i in filled),
            out_specs=rule.out(sharding, {**arrays, **dict(options)}),
            axis_names=set(mesh.axis_names) - set(context.manual_axes),
            check_vma=not rule.replicated,
        )
        return mapped(*(placed_as(leaves[i], mesh, specs[i]) for i in filled))

    return jax.jit(run, inline=True)


# ---- the shardings of results ----


def cache_only(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """The next cache."""
    del arguments
    return sharding.split


def attention(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """The results of attention: out, then lse with return_lse."""
    out = sharding.heads(np.ndim(arguments["q"]))
    lse = PartitionSpec(*out[:-1])
    return (out, lse) if arguments.get("return_lse") else out


def attention_and_cache(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """The results of attention, and the next cache."""
    out = attention(sharding, arguments)
    return (*(out if arguments.get("return_lse") else (out,)), sharding.split)


def cache_and_ok(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """The next cache, and a result that is the same on all devices of a replica."""
    del arguments
    return sharding.split, sharding.rows


def everywhere(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """Results that are the same on all devices of a replica."""
    del arguments
    return sharding.rows


def keys_and_values(sharding: AxisSharding, arguments: dict[str, Any]) -> Any:
    """k and v, [S, max_seq_len, Hkv, D]; each copy of a head counts separately."""
    if isinstance(sharding, StripeSharding):
        heads = PartitionSpec(None, sharding.axis)
    else:
        heads = sharding.heads(4)
    if sharding.rows and _replicas.names_slots(arguments):  # see `_replicas.parts_of`
        heads = PartitionSpec(*sharding.rows, None, *heads[1:])
    return (heads, heads)


def in_order(sharding: AxisSharding, pair: Any) -> Any:
    """Returns k and v with each head once, and tokens ordered by position."""
    if isinstance(sharding, StripeSharding):
        return tuple(map(sharding.in_order, map(gathered, pair)))
    if np.ndim(pair[0]) > 4:
        pair = tuple(_replicas.joined("read_kv", array) for array in pair)
    copies = _copies(sharding)
    if copies == 1:
        return pair
    # Not over replicas: if one of them fails, the others would wait for it.
    return tuple(gathered(array, sharding.rows)[:, :, ::copies] for array in pair)
