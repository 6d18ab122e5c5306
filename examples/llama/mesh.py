"""The model over several devices (`--mesh`): each computes its heads and its part of the MLP.

The step is the model under `jax.shard_map`. Each device has a part of the weights: rows of the
first projections of attention and MLP, columns of the last ones, whose products are summed over the
devices. The embedding and the norms are on all devices. A second mesh axis (`--mesh dp=N`) has
replicas of the model, each with its own sequences (`KVPool(data_axis=...)`).
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvpage
from jax_kvpage.serving import Step

from .config import LlamaConfig
from .mesh_sizes import MeshSizes
from .model import Llama
from .prompts import InputError
from .serving import model_step

__all__ = ["AXIS", "DATA_AXIS", "make_mesh", "pool_bytes", "sharded_step"]

AXIS, DATA_AXIS = "tp", "dp"

# For each fused projection, the number of heads and the rows of a head.
_Parts = list[tuple[int, int]]


def make_mesh(size: int, config: LlamaConfig, replicas: int = 1) -> Mesh:
    """A mesh of the first `size` devices, or of `size` devices for each of several replicas.

    Raises:
      InputError: There are fewer devices, or the model cannot be divided among them.
    """
    devices, count = jax.devices(), replicas * size
    if len(devices) < count:
        raise InputError(
            f"--mesh {MeshSizes(size, replicas)}: JAX has {len(devices)} devices; on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    kv_heads = config.num_key_value_heads
    sizes = {
        "attention heads": config.num_attention_heads,
        "elements of the MLP": config.intermediate_size,
    }
    wrong = [f"{count} {name}" for name, count in sizes.items() if count % size]
    if kv_heads % size and size % kv_heads:
        wrong.append(f"{kv_heads} key/value heads")
    if wrong:
        raise InputError(f"--mesh {AXIS}={size} does not divide the model's {' and '.join(wrong)}")
    shape, names = ((size,), (AXIS,)) if replicas == 1 else ((replicas, size), (DATA_AXIS, AXIS))
    types = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[:count])


def pool_bytes(spec: jax_kvpage.CacheSpec, blocks: int, sizes: MeshSizes) -> int:
    """The capacity of a pool over a mesh in which each replica has `blocks` blocks."""
    heads = max(spec.num_kv_heads // sizes.tp, 1)
    local = dataclasses.replace(spec, num_kv_heads=heads)
    return sizes.devices * blocks * local.block_bytes


def sharded_step(model: Llama, mesh: Mesh, implementation: str | None) -> tuple[Step, Any]:
    """The model in the form for the engine: a step function, and weights split over the mesh.

    Args:
      model: The model; it is modified, and must not be used afterwards.
      mesh: From `make_mesh`. With replicas, tokens, batch and logits have a part for each.
      implementation: As for `jax_kvpage.update_and_attend`.
    """
    size = mesh.shape[AXIS]
    for layer in model.layers:
        layer.self_attn.o_proj.summed_over = layer.mlp.down_proj.summed_over = AXIS
        for projection, parts in (
            (layer.self_attn.qkv_proj, _qkv(model.config)),
            (layer.mlp.gate_up_proj, _gate_up(model.config)),
        ):
            projection.parts = tuple(max(heads // size, 1) * rows for heads, rows in parts)
    on_shard, _ = model_step(model, implementation, gather=False)
    named, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    weights, specs = [], []
    for path, leaf in named:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        value, spec = _spread(model.config, names, leaf, size)
        weights.append(_placed(np.asarray(value), NamedSharding(mesh, spec)))
        specs.append(spec)

    cache, rows = P(AXIS), P()
    if DATA_AXIS in mesh.axis_names:
        cache, rows = P((DATA_AXIS, AXIS)), P(DATA_AXIS)
    step = jax.shard_map(
        on_shard, mesh=mesh, in_specs=(specs, cache, rows, rows), out_specs=(rows, cache)
    )
    return step, weights


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a parameter on the mesh, whose devices may belong to several processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _spread(config: LlamaConfig, names: set[str], value: Any, size: int) -> tuple[Any, P]:
    """Reorders a parameter by device; returns it and how it is split.

    Args:
      config: The model's configuration.
      names: The names on the path to the parameter.
      value: The parameter.
      size: Number of devices.
    """
    if "qkv_proj" in names:
        return _by_device(value, _qkv(config), size), P(AXIS)
    if "gate_up_proj" in names:
        return _by_device(value, _gate_up(config), size), P(AXIS)
    if names & {"o_proj", "down_proj"} and "weight" in names:
        return value, P(None, AXIS)
    return value, P()


def _qkv(config: LlamaConfig) -> _Parts:
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    return [(config.num_attention_heads, dim), (kv_heads, dim), (kv_heads, dim)]


def _gate_up(config: LlamaConfig) -> _Parts:
    return [(config.intermediate_size, 1)] * 2


def _by_device(rows: Any, parts: _Parts, size: int) -> np.ndarray:
    """Reorders the rows of fused projections so that the rows of each device are contiguous.

    Args:
      rows: `[outputs, ...]`.
      parts: Heads, and rows of a head, of each projection.
      size: Number of devices. If there are fewer heads, several devices have the same head.
    """
    array, begin, shares = np.asarray(rows), 0, []
    for heads, dim in parts:
        part = array[begin : begin + heads * dim].reshape(heads, dim, *array.shape[1:])
        begin += heads * dim
        own = part.repeat(max(size // heads, 1), axis=0)
        shares.append(own.reshape(size, -1, *array.shape[1:]))
    return np.concatenate(shares, axis=1).reshape(-1, *array.shape[1:])
