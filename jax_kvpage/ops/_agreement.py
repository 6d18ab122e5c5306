"""Ops that fail either on all devices or on none.

A device whose op fails leaves its program, and devices that wait for it in a collective would wait
until XLA aborts the process. So an op here does not fail: it returns an error number, 0 for no
error. The devices agree on a number, and `agreed` fails on all of them with that error. CPU only.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvpage.ops import _batching, _lowering
from jax_kvpage.ops._checks import EPOCH, results
from jax_kvpage.spec import CacheSpec

__all__ = [
    "FAULT",
    "agreed",
    "agreed_fault",
    "refuse_batching",
    "try_advance_p",
    "try_append_kv_p",
    "try_set_lengths_p",
]

# Shape and dtype of an error number.
FAULT = ((1,), jnp.int32)


def _abstract_append(*avals: Any, spec: CacheSpec) -> list[Any]:
    del spec
    return results(avals, EPOCH, FAULT)


def _abstract_lengths(*avals: Any, spec: CacheSpec) -> list[Any]:
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32), FAULT)


def _abstract_raise(fault: Any, *arrays: Any) -> list[Any]:
    # Results that vary over the mesh still do; the others are equal wherever there is a result.
    return [results((fault, array), (array.shape, array.dtype))[0] for array in arrays]


# Like append_kv_p, advance_p and set_lengths_p, with the same operands, but with FAULT as the last
# result. Shapes are checked before.
try_append_kv_p = _lowering.make_primitive("try_append_kv", _abstract_append)
try_advance_p = _lowering.make_primitive("try_advance", _abstract_lengths)
try_set_lengths_p = _lowering.make_primitive("try_set_lengths", _abstract_lengths)
_lowering.register_lowerings(try_append_kv_p, name="append_kv", aliases={1: 0})
_lowering.register_lowerings(try_advance_p, name="advance", aliases={1: 0, 2: 1})
_lowering.register_lowerings(try_set_lengths_p, name="set_lengths", aliases={1: 0, 2: 1})

# Takes FAULT and three arrays, and returns the arrays.
_raise_fault_p = _lowering.make_primitive("raise_fault", _abstract_raise, static=())
_lowering.register_lowerings(_raise_fault_p, aliases={1: 0, 2: 1, 3: 2})


def refuse_batching(primitive: Any, op: str) -> None:
    """Makes vmap of an op raise an error that names the way out."""

    def refuse(operands: Any, dims: Any, **params: Any) -> Any:
        del operands, dims, params
        raise ValueError(
            f"vmap of {op}: not served over a cache whose sequences are spread over a mesh: make "
            "one batch of all sequences (Batch.from_lengths, Batch.padded)"
        )

    _batching.register(primitive, refuse)


for _primitive, _op in (
    (try_append_kv_p, "append_kv"),
    (try_advance_p, "advance"),
    (try_set_lengths_p, "set_lengths"),
):
    refuse_batching(_primitive, _op)
    _lowering.refuse_differentiation(_primitive)


def agreed_fault(faults: Sequence[jax.Array], axis: str) -> jax.Array:
    """Returns the error number with which all devices fail; 0 if none fails.

    Args:
        faults: errors of this device's ops, in order: the first one counts.
        axis: mesh axis.
    """
    first = faults[-1]
    for fault in faults[-2::-1]:
        first = jnp.where(fault > 0, fault, first)
    return jax.lax.pmax(first, axis)


def agreed(
    fault: jax.Array, epoch: jax.Array, one: jax.Array, two: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the arrays, or fails the program on all devices if one device has failed.

    Args:
        fault: from `agreed_fault`.
        epoch: epoch after the op, so that later ops wait for the agreement.
        one: any array.
        two: any array.

    Returns:
        epoch, one and two (an arbitrary array without `two`).

    Raises:
        jax.errors.JaxRuntimeError: at run time: the error of a device.
    """
    epoch, one, two = _raise_fault_p.bind(fault, epoch, one, fault if two is None else two)
    return epoch, one, two
