"""Reads and writes the weights of a Hugging Face model: safetensors, in one file or sharded.

Tensors are read directly into the model's arrays (tensors.py), including those that the model fuses
into one array, so a checkpoint of several gigabytes is never in memory twice. The entire checkpoint
is checked before the first tensor is read, and all problems are reported together.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from .config import LlamaConfig, load_config
from .model import Llama
from .tensors import TensorFile, aligned_empty

__all__ = ["CheckpointError", "load_model", "save_model"]

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}
# Rotary frequencies, stored in some old checkpoints; they are computed from the configuration.
_IGNORED = ".rotary_emb.inv_freq"
_LISTED = 8  # the most names in an error message

_Tensor = tuple[str, tuple[int, ...]]  # name in the checkpoint, and shape


class CheckpointError(ValueError):
    """Weights that are missing, damaged, or do not match the configuration."""


def load_model(path: str | pathlib.Path, *, dtype: jnp.dtype | None = None) -> Llama:
    """Loads the model in the directory `path`, with weights and arithmetic in `dtype` (None: as in
    its config.json).

    Raises:
      ConfigError: As for `load_config`.
      CheckpointError: A file or tensor is missing, has an unexpected shape or type, or does not
        belong to the model.
    """
    path = pathlib.Path(path)
    config = load_config(path)
    chosen = jnp.dtype(config.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: Llama(config, dtype=chosen, rngs=None))
    files = _tensor_files(path)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    parameters = [_tensors(config, key_path, leaf.shape) for key_path, leaf in leaves]
    _check(path, config, dict(itertools.chain.from_iterable(parameters)), files)
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(TensorFile(file)) for file in sorted(set(files.values()))
        }
        readers = {name: opened[file] for name, file in files.items()}
        # Two threads: one reads while the other allocates memory or converts.
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
        read = functools.partial(_read, readers, dtype=chosen)
        weights = list(threads.map(read, parameters))
    return nnx.merge(graph, jax.tree.unflatten(tree, weights))


def _read(readers: dict[str, TensorFile], tensors: list[_Tensor], dtype: jnp.dtype) -> jax.Array:
    """Reads a parameter of the model: one tensor, or several to concatenate."""
    (_, (_, *inner)) = tensors[0]
    rows = [shape[0] for _, shape in tensors]
    whole = aligned_empty((sum(rows), *inner), dtype)
    end = 0
    for (name, _), count in zip(tensors, rows, strict=True):
        readers[name].read_into(name, whole[end : end + count])
        end += count
    # On CPU, JAX uses the array's memory; elsewhere the array is copied to the device and freed.
    return jax.device_put(whole)


def save_model(model: Llama, path: str | pathlib.Path, *, dtype: jnp.dtype = jnp.bfloat16) -> None:
    """Writes `config.json` and `model.safetensors` with weights in `dtype` to the directory
    `path`."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = model.config.to_json() | {"torch_dtype": jnp.dtype(dtype).name}
    text = json.dumps(values, indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    tensors = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        end = 0
        for name, shape in _tensors(model.config, key_path, leaf.shape):
            tensors[name] = jnp.asarray(leaf[end : end + shape[0]], dtype)
            end += shape[0]
    save_file(tensors, str(path / _FILE), metadata={"format": "pt"})


def _tensors(
    config: LlamaConfig, key_path: jax.tree_util.KeyPath, shape: tuple[int, ...]
) -> list[_Tensor]:
    """The checkpoint's tensors that make up a parameter, derived from the names of the model's
    attributes, which are close to those of the checkpoint.
    """
    parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in key_path]
    if parts[-1] == "value":
        parts.pop()
    if parts[-1] == "scale":
        parts[-1] = "weight"
    elif parts[-1] in ("embed_tokens", "lm_head"):
        parts.append("weight")
    if parts[0] != "lm_head":
        parts.insert(0, "model")
    *module, projection, kind = parts
    rows = _FUSED[projection](config) if projection in _FUSED else {projection: shape[0]}
    return [(".".join([*module, name, kind]), (count, *shape[1:])) for name, count in rows.items()]


def _qkv_rows(config: LlamaConfig) -> dict[str, int]:
    dim = config.head_dim
    keys = config.num_key_value_heads * dim
    return {"q_proj": config.num_attention_heads * dim, "k_proj": keys, "v_proj": keys}


def _gate_up_rows(config: LlamaConfig) -> dict[str, int]:
    return dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)


# The projections that the model fuses, with the rows of each.
_FUSED = {"qkv_proj": _qkv_rows, "gate_up_proj": _gate_up_rows}


def _tensor_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor, from the index if there is one."""
    if (path / _INDEX).is_file():
        try:
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): path / str(file) for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path / _INDEX} is not an index of safetensors files: {error!r}"
            ) from error
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            total = len(set(files.values()))
            listed = _some(missing)
            raise CheckpointError(f"{path}: {len(missing)} of {total} shards are missing: {listed}")
        return files
    file = path / _FILE
    if not file.is_file():
        other = sorted(item.name for item in path.glob("*.bin"))
        hint = f"; {other[0]} is a PyTorch file, convert it to safetensors" if other else ""
        raise CheckpointError(f"no {_FILE} or {_INDEX} in {path}{hint}")
    with _open(file) as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _open(file: pathlib.Path) -> safe_open:
    try:
        return safe_open(file, framework="flax")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error


def _check(
    path: pathlib.Path,
    config: LlamaConfig,
    shapes: dict[str, tuple[int, ...]],
    files: dict[str, pathlib.Path],
) -> None:
    """Compares the tensors that the model needs with the files; raises one error for all
    differences."""
    problems = []
    missing = [name for name in shapes if name not in files]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    extra = sorted(name for name in files if name not in shapes and not name.endswith(_IGNORED))
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a copy of the embedding in some checkpoints
    if extra:
        problems.append(f"{len(extra)} tensors are not of this model: {_some(extra)}")
    wrong = []
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            held = set(tensors.keys())
            for name in (name for name in shapes if files.get(name) == file):
                if name not in held:
                    wrong.append(f"{name} is not in {file.name}, where the index says it is")
                    continue
                view = tensors.get_slice(name)
                shape = tuple(view.get_shape())
                if shape != shapes[name]:
                    wanted = list(shapes[name])
                    wrong.append(f"{name} is {list(shape)}, config.json asks for {wanted}")
                elif view.get_dtype() not in _DTYPES:
                    wrong.append(f"{name} is {view.get_dtype()}, expected one of {sorted(_DTYPES)}")
    if wrong:
        problems.append(_some(wrong, "; "))
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def _some(items: list[str], separator: str = ", ") -> str:
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
