"""Shared by all primitives: eager calls, lowering rules, the differentiation error.

Primitives carry no JAX effect: an effect in the jaxpr takes every dispatch of the whole program off
JAX's fast path. Instead, the side effect is declared on the custom call to which a primitive is
lowered, where XLA needs it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from jax_kvpage import _compat
from jax_kvpage import _cuda as cuda
from jax_kvpage._arrays import to_device
from jax_kvpage.ops import _scratch
from jax_kvpage.spec import CacheSpec

__all__ = [
    "ADDRESSINGS",
    "IMPLEMENTATIONS",
    "absent",
    "bind",
    "check_implementation",
    "make_primitive",
    "refuse_differentiation",
    "register_lowerings",
]

IMPLEMENTATIONS = ("cpu", "cuda", "xla")
# How kernels find keys and values. Compiled programs contain the index.
ADDRESSINGS = ("slots", "table")
# Parameters that determine shapes or rules but are not attributes of the custom call.
_NOT_ATTRIBUTES = ("return_lse", "implementation")

Abstract = Callable[..., Sequence[Any]]


def make_primitive(name: str, abstract: Abstract, static: Sequence[str] = ("spec",)) -> Primitive:
    """Creates a primitive with several results, abstract evaluation and eager calls.

    Args:
        name: name without the package prefix.
        abstract: abstract evaluation, `abstract(*avals, **params)`.
        static: names of the parameters.
    """
    primitive = Primitive(f"kvpage_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    compiled = jax.jit(primitive.bind, static_argnames=tuple(static))

    def call_eagerly(*operands: Any, **params: Any) -> Any:
        if _compat.guards_transfers():
            operands = tuple(map(to_device, operands))
        # Without jit there would be nothing to run, so disable_jit must not apply to this call.
        with jax.disable_jit(False):
            return compiled(*operands, **params)

    primitive.def_impl(call_eagerly)
    return primitive


def bind(
    primitive: Primitive,
    abstract: Abstract,
    operands: Sequence[Any],
    params: Mapping[str, Any],
    problems: Sequence[str] = (),
) -> Any:
    """Binds a primitive, reporting mistakes found beforehand together with those of its shapes.

    Args:
        primitive: primitive to bind.
        abstract: its abstract evaluation, which also takes `problems`.
        operands: arrays.
        params: static parameters.
        problems: mistakes that abstract values do not show.

    Raises:
        ValueError: lists all mistakes.
    """
    if problems:
        abstract(*map(jax.typeof, operands), **params, problems=tuple(problems))
    return primitive.bind(*operands, **params)


def _attribute(value: Any) -> Any:
    """Converts a parameter to the width that the C++ handlers declare."""
    if isinstance(value, CacheSpec):
        return np.asarray(value.as_ints(), np.int64)
    if isinstance(value, str):
        return np.int32(ADDRESSINGS.index(value))
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def _refuse_partitions(op: str, ctx: mlir.LoweringRuleContext) -> None:
    """Refuses an op on a pool in a program that is partitioned over several devices.

    XLA would fail with an internal error about side effects and sharding.

    Raises:
        ValueError: the number of devices is not 1.
    """
    count = _compat.num_partitions(ctx)
    if count != 1:
        raise ValueError(
            f"{op}: the program is compiled for {count} devices (an array that it works on is "
            "sharded or replicated over a mesh), but a pool and its cache live on one device: run "
            "the step under jax.shard_map over all axes of the mesh, with one KVPool a device and "
            "that pool's cache in each shard; make one pool over the mesh with "
            "KVPool(..., mesh=mesh, axis=...); or keep all arrays on the pool's device"
        )


def _behind_barriers(ctx: mlir.LoweringRuleContext, avals: Sequence[Any], values: Any) -> Any:
    """Puts each value behind a barrier that XLA's dynamic-slice fusion does not look through.

    That fusion wraps a custom call whose operand is a slice, or whose result goes into a
    dynamic-update-slice. In jaxlib 0.11 it also leaves the original call in the program if the call
    has a side effect or its result has another user, so the op would run twice. A barrier on a
    single array stays until the program is scheduled, and is free from then on; the fusion would
    look through one over several arrays.
    """

    def barriers(*arrays: Any) -> list[Any]:
        return [jax.lax.optimization_barrier(array) for array in arrays]

    lower = mlir.lower_fun(barriers, multiple_results=True)
    return lower(ctx.replace(primitive=None, avals_in=avals, avals_out=avals), *values)


def _refusal(
    op: str, implementation: str | None, platform: str, xla: bool, by_table: bool
) -> ValueError:
    """Builds the error for an op that cannot be compiled, with all reasons and ways out."""
    asked = f"implementation={implementation!r}" if implementation else "the op"
    reasons, ways = [], []
    if implementation is not None and implementation != platform:
        reasons.append(f"there are no {implementation!r} kernels on {platform!r}")
        ways.append(f"leave implementation=None, or compile for {implementation}")
    if platform == "cuda" and cuda.missing_here():
        reasons.append("this build of jax_kvpage has no CUDA kernels")
        ways.append(cuda.HOW_TO_BUILD)
    if platform not in ("cpu", "cuda"):
        reasons.append("there are kernels for 'cpu' and 'cuda' only")
        ways.append("compile for cpu (jax.jit under jax.default_device(jax.devices('cpu')[0]))")
    if xla and not by_table:
        ways.append("use implementation='xla'")
    return ValueError(
        f"{op}: {asked} cannot be compiled for platform {platform!r}: {'; '.join(reasons)}. "
        f"Either {'; or '.join(ways)}"
    )


def register_lowerings(
    primitive: Primitive,
    *,
    name: str | None = None,
    aliases: Mapping[int, int] | None = None,
    side_effect: bool = True,
    xla: Callable[..., Any] | None = None,
    xla_is_default: bool = False,
    scratch: Callable[[Sequence[Any], Mapping[str, Any]], int] | None = None,
    plan: Callable[..., tuple[Any, Any]] | None = None,
) -> None:
    """Registers how a primitive is lowered on each platform, as the same custom call everywhere.

    Args:
        primitive: named kvpage_<op>; the custom call's target is jax_kvpage_<op>.
        name: name for messages, if users know the op by another name than <op>.
        aliases: maps an operand index to the index of the result that shares its buffer.
        side_effect: whether XLA must keep calls even if their results look unused or equal.
        xla: the op in pure JAX, `xla(*operands, **params)` without `implementation`; traced instead
            of the custom call for implementation="xla".
        xla_is_default: whether platforms without kernels use `xla` by default.
        scratch: returns the bytes of device memory that the call needs on CUDA, `scratch(operands'
            abstract values, params)`, passed as an additional result.
        plan: returns an additional operand on CUDA, `plan(ctx, operands, params) -> (value,
            abstract value)`.
    """
    op = primitive.name.removeprefix("kvpage_")
    shown = name or op
    custom_call = jax.ffi.ffi_lowering(
        f"jax_kvpage_{op}", has_side_effect=side_effect, operand_output_aliases=dict(aliases or {})
    )

    def lower_xla(ctx: mlir.LoweringRuleContext, operands: Sequence[Any], params: Any) -> Any:
        assert xla is not None
        kept = {name: value for name, value in params.items() if name != "implementation"}

        def traced(*arrays: Any) -> Any:
            # The results' abstract values assume that the operands are gathered.
            return xla(*map(_compat.gathered, arrays), **kept)

        return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)

    def call(ctx: mlir.LoweringRuleContext, operands: Sequence[Any], params: Any) -> Any:
        if side_effect:
            _refuse_partitions(shown, ctx)
        attributes = {n: _attribute(v) for n, v in params.items() if n not in _NOT_ATTRIBUTES}
        return custom_call(ctx, *operands, **attributes)

    def by_table(params: Mapping[str, Any]) -> bool:
        return bool(params.get("addressing") == "table")

    def lower_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        implementation = params.get("implementation")
        if implementation == "xla":
            return lower_xla(ctx, operands, params)
        if implementation not in (None, "cpu"):
            raise _refusal(shown, implementation, "cpu", xla is not None, by_table(params))
        return call(ctx, operands, params)

    def lower_cuda(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        implementation = params.get("implementation")
        if implementation == "xla" or (
            implementation is None and xla_is_default and not cuda.BUILT
        ):
            return lower_xla(ctx, operands, params)
        # A machine without CUDA may lower for one that has it (jax.export), and its build of this
        # package may lack CUDA too. Only where the program can run must the kernels exist.
        if implementation not in (None, "cuda") or cuda.missing_here():
            plain = xla_is_default or (xla is not None and not cuda.missing_here())
            raise _refusal(shown, implementation, "cuda", plain, by_table(params))
        avals_out, in_scratch = ctx.avals_out, scratch(ctx.avals_in, params) if scratch else None
        if plan is not None:
            value, aval = plan(ctx, operands, params)
            operands = (*operands, value)
            ctx = ctx.replace(avals_in=[*ctx.avals_in, aval])
        operands = _behind_barriers(ctx, ctx.avals_in, operands)
        if in_scratch is not None:
            ctx = _scratch.with_result(ctx, in_scratch)
        results = call(ctx, operands, params)[: len(avals_out)]
        return _behind_barriers(ctx, avals_out, results)

    def lower_elsewhere(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        implementation = params.get("implementation")
        # The pure JAX form of an op on a pool still begins with a custom call; only ops on page
        # arrays do without.
        if xla_is_default and implementation in (None, "xla"):
            return lower_xla(ctx, operands, params)
        platforms = ctx.platforms or ctx.module_context.platforms
        where, table = ", ".join(platforms), by_table(params)
        raise _refusal(shown, implementation, where, xla_is_default, table)

    mlir.register_lowering(primitive, lower_cpu, platform="cpu")
    mlir.register_lowering(primitive, lower_cuda, platform="cuda")
    mlir.register_lowering(primitive, lower_elsewhere)


def refuse_differentiation(
    primitive: Primitive,
    name: str | None = None,
    why: str = "the cache lies outside of what JAX traces, so there is no gradient through it",
) -> None:
    """Makes jvp, grad and vjp of a primitive raise an error that names the way out.

    Args:
        primitive: named kvpage_<op>.
        name: name for messages, if users know the op by another name than <op>.
        why: the reason, for messages.
    """
    op = name or primitive.name.removeprefix("kvpage_")

    def refuse(primals: Any, tangents: Any, **params: Any) -> Any:
        del primals, tangents, params
        raise ValueError(
            f"{op} cannot be differentiated: {why}. For inference inside a differentiated program "
            "wrap the floating point arguments in jax.lax.stop_gradient; for training attend over "
            "dense arrays, for instance with jax.nn.dot_product_attention."
        )

    ad.primitive_jvps[primitive] = refuse


def check_implementation(implementation: str | None, problems: list[str]) -> None:
    """Adds a problem if the name is not one of IMPLEMENTATIONS."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        problems.append(f"implementation: wanted {known} or None, got {implementation!r}")


def absent() -> Any:
    """Returns a placeholder for an optional per-head array that was not given.

    Inside a program it is computed: a constant would become an argument of shard_map, and jaxlib
    0.11's Shardy partitioner crashes on empty ones.
    """
    return _nothing() if _compat.is_tracing() else np.zeros((0,), np.float32)


@functools.partial(jax.jit, inline=True)  # under an eager vmap, a program without transfers
def _nothing() -> Any:
    return jax.lax.full((0,), 0, np.float32)
