"""read_views: reads zero-copy views of a pool after the writes of the same program.

To XLA, a view is an argument that nothing changes, so its reads may run before or concurrently with
the custom calls that write the same memory, and `optimization_barrier` orders values, not memory.
Here the reads are in a branch of a conditional, which runs only once its predicate is known. The
predicate comes from a custom call that takes the cache's epoch; as far as XLA knows, it may be
false. A second custom call, inside the branch, takes the views. XLA neither inlines a branch with
such a side effect nor turns its conditional into a select, and the call compares addresses: a view
that was copied on the way raises an error instead of reading old values.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh
from jax_kvpage.ops._checks import Checker, cache_operands, pool_checker, results, show
from jax_kvpage.spec import CacheSpec

__all__ = ["read_views"]

_Result = TypeVar("_Result")


def _abstract(*avals: Any, spec: CacheSpec) -> list[Any]:
    check = pool_checker("read_views", spec)
    check.cache(*avals[:3])
    check.done()
    return results(avals, ((), jnp.bool_))


# Operands: the cache's arrays, then the views. Result: true, or the program fails.
check_views_p = _lowering.make_primitive("check_views", _abstract)


def read_views(cache: KVCache, read: Callable[..., _Result], *views: Any) -> _Result:
    """Calls `read(*views)` after everything that the program has written to the cache.

    A program that changes a cache and reads a `KVPool.view` of the same pool must read through this
    function: to XLA, a view is a constant argument, and a direct read may return the contents
    before the program's own writes. Nothing is copied. It works under jit, in scans, loops and
    conditionals, with and without donation of the cache. In these, pass the views to the jitted
    function as arguments and close over them in the body; never carry them through a loop.

    The read is ordered after the writes that `cache` has seen. If the program later lowers a length
    or releases what was read, order that after the read with `cache = after(cache, out)`.

    Example:
        def decode(cache, k_view, v_view, q, k, v, batch):  # one layer, one new token a sequence
            cache = kvp.append_kv(cache, k, v, batch, layer=0)
            lengths = cache.lengths[batch.slots] + 1

            def attend(keys, values):
                return jax.nn.dot_product_attention(
                    q[:, None], keys[batch.slots], values[batch.slots],
                    key_value_seq_lengths=lengths)

            return cache, kvp.read_views(cache, attend, k_view, v_view)

        cache, out = jax.jit(decode)(cache, *pool.view(0), q, k, v, batch)

    Args:
        cache: the cache returned by the last write.
        read: computes a tree of arrays from the views. It may close over any values except those
            computed from a view outside it. Slice, gather and convert the views inside. It must not
            return a view.
        *views: any number of arrays returned by `KVPool.view`, [max_slots, max_seq_len, kv heads,
            head_dim] or [max_seq_len, kv heads, head_dim], or trees of them (for instance a list
            with a (k, v) per layer, between which `read` chooses with `lax.switch`).

    Returns:
        The result of `read`.

    Raises:
        ValueError: `cache` is not a KVCache, or `read` is not callable; the cache's pool has no
            views (layout, quantized storage, not on CPU); an array does not have the shape and
            dtype of a view; there are no views; or the result is a view.
        jax.errors.JaxRuntimeError: an array is a copy of a view or belongs to another pool; the
            cache is of an older generation; the pool is closed; or the slot of a single-slot view
            is free or has been reassigned since the cache. With a view of all slots, it is unknown
            which slots `read` uses, so they are not checked.
    """
    _mesh.refuse("read_views", cache, "such a pool has no views: read it with paged_attention")
    state = cache_operands("read_views", cache)
    if not callable(read):
        raise ValueError(
            f"read_views: read: wanted a function of the views, got {type(read).__name__}"
        )
    arrays = _check_arguments(cache, state, views)

    def ordered() -> Any:
        (checked,) = check_views_p.bind(*state, *arrays, spec=cache.spec)
        out = read(*views)
        _refuse_views(out, views)
        # JAX drops a call whose result is not used.
        return jax.tree.map(lambda x: jnp.where(checked, x, jnp.zeros_like(x)), out)

    like = jax.eval_shape(ordered)

    def never() -> Any:
        return jax.tree.map(jnp.zeros_like, like)

    (ready,) = check_views_p.bind(*state, spec=cache.spec)
    result: _Result = jax.lax.cond(ready, ordered, never)
    return result


def _check_arguments(cache: KVCache, state: Sequence[Any], views: Sequence[Any]) -> list[Any]:
    """Checks the arguments, and returns the views as operands of check_views_p.

    Raises:
        ValueError: lists all problems of the cache's arrays, its spec and the views.
    """
    spec = cache.spec
    check = pool_checker("read_views", spec)
    check.cache(*map(jax.typeof, state))
    if spec.layout != "per_layer" or spec.quantized:
        check.add(
            f"cache: a pool with layout {spec.layout!r} and {np.dtype(spec.dtype).name} storage "
            "has no views: make it with CacheSpec(..., layout='per_layer') and float32, bfloat16 "
            "or float16 storage, or read the cache with paged_attention"
        )
    else:
        for path, leaf in jax.tree_util.tree_leaves_with_path(views):
            _check_view(check, f"views{jax.tree_util.keystr(path)}", leaf, spec)
    leaves = jax.tree.leaves(views)
    if not leaves:
        check.add("views: got none: pass the arrays that pool.view returned, read(*views)")
    check.done()
    # Only `read` itself contributes to derivatives.
    return [jax.lax.stop_gradient(leaf) for leaf in leaves]


def _refuse_views(out: Any, views: Any) -> None:
    given = [id(leaf) for leaf in jax.tree.leaves(views)]
    if any(id(leaf) in given for leaf in jax.tree.leaves(out)):
        raise ValueError(
            "read_views: read returned a view, which would be copied as a whole: return what "
            "is computed from the views"
        )


def _check_view(check: Checker, name: str, leaf: Any, spec: CacheSpec) -> None:
    one = (spec.max_seq_len, spec.num_kv_heads, spec.head_dim)
    if isinstance(leaf, jax.Array):
        if leaf.dtype == spec.dtype and leaf.shape in (one, (spec.max_slots, *one)):
            return
        got = show(jax.typeof(leaf))
    else:
        got = type(leaf).__name__
    check.add(
        f"{name}: wanted an array from pool.view, {np.dtype(spec.dtype).name} "
        f"[max_slots={spec.max_slots}, max_seq_len={spec.max_seq_len}, Hkv={spec.num_kv_heads}, "
        f"D={spec.head_dim}] or the same without max_slots, got {got}: slice, gather and convert "
        "views inside read"
    )


_lowering.register_lowerings(check_views_p)


def _lower_elsewhere(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
    del operands, params
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise ValueError(
        f"read_views: cannot be compiled for platform {platforms!r}: only pools on CPU have views. "
        "Read the cache with paged_attention, or compile for cpu"
    )


mlir.register_lowering(check_views_p, _lower_elsewhere, platform="cuda")
mlir.register_lowering(check_views_p, _lower_elsewhere)


def _batch(operands: Any, dims: Any, **params: Any) -> Any:
    def wrong(name: str, dim: int | None) -> str:
        if name == "views" and dim is not None:
            return "a view is batched, but must be the same for all elements (in_axes=None)"
        return _batching.never_mapped(name, dim)

    names = (*_batching.CACHE, *["views"] * (len(operands) - 3))
    _batching.refuse("read_views", names, dims, wrong)
    return check_views_p.bind(*operands, **params), [None]


_batching.register(check_views_p, _batch)
