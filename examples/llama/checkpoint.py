"""Reads and writes the weights of a Hugging Face Llama: safetensors, in one file or sharded.

Tensors go straight from the file to the model, one at a time: a checkpoint of several gigabytes is
never held twice. Every problem of the whole checkpoint is found before the first tensor is read,
and reported at once.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from .config import LlamaConfig, load_config
from .model import Llama

__all__ = ["CheckpointError", "load_model", "save_model"]

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}
# Rotary frequencies, stored by some old checkpoints; they follow from the configuration.
_IGNORED = ".rotary_emb.inv_freq"
_LISTED = 8  # names in an error message


class CheckpointError(ValueError):
    """Weights that are missing, damaged, or not those that the configuration describes."""


def load_model(path: str | pathlib.Path, *, dtype: jnp.dtype | None = None) -> Llama:
    """The model in the directory `path`, with weights and arithmetic in `dtype` (None: as in its
    config.json).

    Raises:
      ConfigError: As `load_config`.
      CheckpointError: A file or tensor is missing, has another shape or type than expected, or is
        not the model's.
    """
    path = pathlib.Path(path)
    config = load_config(path)
    chosen = jnp.dtype(config.dtype if dtype is None else dtype)
    model = nnx.eval_shape(lambda: Llama(config, dtype=chosen, rngs=nnx.Rngs(0)))
    files = _tensor_files(path)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = [_tensor_name(key_path) for key_path, _ in leaves]
    shapes = {
        name: _file_shape(name, leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)
    }
    _check(path, config, shapes, files)
    weights = {}
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            for name in (name for name in names if files[name] == file):
                array = tensors.get_tensor(name)
                weights[name] = jnp.asarray(array.T if _is_transposed(name) else array, chosen)
    return nnx.merge(graph, jax.tree.unflatten(tree, [weights[name] for name in names]))


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
        name = _tensor_name(key_path)
        tensors[name] = jnp.asarray(leaf.T if _is_transposed(name) else leaf, dtype)
    save_file(tensors, str(path / _FILE), metadata={"format": "pt"})


def _tensor_name(key_path: jax.tree_util.KeyPath) -> str:
    """The checkpoint's name of a parameter: the model's attributes follow its names closely."""
    parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in key_path]
    if parts[-1] == "value":
        parts.pop()
    if parts[-1] in ("kernel", "scale"):
        parts[-1] = "weight"
    elif parts[-1] in ("embed_tokens", "lm_head"):
        parts.append("weight")
    return ".".join(parts if parts[0] == "lm_head" else ["model", *parts])


def _is_transposed(name: str) -> bool:
    """Flax keeps the weight of a projection as `[inputs, outputs]`, the file as `[outputs,
    inputs]`.
    """
    return name.endswith("_proj.weight")


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _is_transposed(name) else shape


def _tensor_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file holds which tensor, by the index if there is one."""
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
    """Compares what the model needs with what the files hold; one error for all differences."""
    problems = []
    missing = [name for name in shapes if name not in files]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    extra = sorted(name for name in files if name not in shapes and not name.endswith(_IGNORED))
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # saved by some although it is the embedding
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
