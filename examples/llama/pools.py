"""Pools for a model, and the store below them."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp

import jax_kvpage

from .arguments import InputError
from .config import LlamaConfig

__all__ = ["make_pool", "make_spec", "open_pool", "open_store", "sequence_length"]


def sequence_length(config: LlamaConfig, wanted: int | None) -> int:
    """The most tokens of a sequence: `wanted`, or the model's max_position_embeddings.

    Raises:
      InputError: It is longer than the model supports.
    """
    length = wanted or config.max_position_embeddings
    if length > config.longest_sequence:
        raise InputError(
            f"--max-seq-len {length} is beyond the {config.longest_sequence} positions that the "
            "model was made for"
        )
    return length


def make_spec(
    config: LlamaConfig,
    slots: int,
    max_seq_len: int | None = None,
    block_tokens: int | None = None,
    dtype: str = "float32",
    layout: str | None = None,
) -> jax_kvpage.CacheSpec:
    """The cache spec of a model, resolved for this platform.

    Raises:
      InputError: See `sequence_length`.
    """
    platform = jax.default_backend()
    return jax_kvpage.CacheSpec(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        slots,
        sequence_length(config, max_seq_len),
        dtype=jnp.dtype(dtype),
        layout=layout,
        block_tokens=block_tokens,
    ).resolve("cuda" if platform == "gpu" else platform)


def open_pool(
    spec: jax_kvpage.CacheSpec,
    capacity: str,
    mesh: jax.sharding.Mesh | None = None,
    store: jax_kvpage.BlockStore | None = None,
) -> jax_kvpage.KVPool:
    """Opens a pool with a capacity such as "64MiB" or a number of bytes, over `mesh` or with
    `store`.

    Raises:
      InputError: The number is too large.
    """
    size: int | str = capacity
    if capacity.isdecimal():
        size = int(capacity)
        if size >= 2**63:
            raise InputError(f"--capacity must be less than 2**63 bytes, got {size}")
    axis, data_axis = (*(mesh.axis_names[::-1] if mesh else ()), None, None)[:2]
    return jax_kvpage.KVPool(spec, size, mesh=mesh, axis=axis, data_axis=data_axis, store=store)


def make_pool(
    config: LlamaConfig,
    slots: int,
    max_seq_len: int | None = None,
    block_tokens: int | None = None,
    capacity: str | None = None,
    share: float = 0.5,
    store: jax_kvpage.BlockStore | None = None,
) -> jax_kvpage.KVPool:
    """Makes a pool for a model, in float32.

    Args:
      config: The model's configuration.
      slots: Number of sequences at a time.
      max_seq_len: The most tokens of a sequence; None for the model's max_position_embeddings.
      block_tokens: Tokens in a block; None for the default.
      capacity: Physical memory; None for `share` of what all slots could take, but at least one
        sequence of full length.
      share: See above.
      store: The store below memory, or None.

    Raises:
      InputError: The sequences are longer than the model supports.
    """
    spec = make_spec(config, slots, max_seq_len, block_tokens)
    size = max(int(slots * spec.max_seq_len * spec.token_bytes * share), spec.slot_bytes)
    return open_pool(spec, capacity or str(size), store=store)


def open_store(path: pathlib.Path, limit: str, checkpoint: pathlib.Path) -> jax_kvpage.BlockStore:
    """Opens the directory `path` as a store for keys and values of one model.

    Args:
      path: The directory; it is created if it does not exist.
      limit: The most that it may use, such as "8GiB".
      checkpoint: The model's directory. Its config.json and the names, sizes and times of its
        weight files are the fingerprint, so that data of other weights is not found.

    Raises:
      InputError: The store cannot be opened.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = [(checkpoint / "config.json").read_text(encoding="utf-8"), weights]
    fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    try:
        return jax_kvpage.BlockStore(path, limit, fingerprint)
    except (ValueError, OSError, jax_kvpage.KVPageError) as error:
        raise InputError(f"--store {path}: {error}") from error
