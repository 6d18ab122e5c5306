"""Loading a checkpoint: the weights are in memory only once, even if they are converted."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from llama.config import LlamaConfig
from llama.tensors import TensorFile, aligned_empty
from safetensors.flax import save_file as save_flax
from safetensors.numpy import save_file
from subprocesses import run_python

# 200 MB in float32, a fifth of which is the embedding.
_CONFIG = LlamaConfig(
    vocab_size=12000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    tie_word_embeddings=True,
    model_type="qwen3",
)
_LOAD = """
    import json, pathlib, sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from llama.checkpoint import load_model
    from llama.config import load_config
    from llama.model import Llama

    def kilobytes(name):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    path = pathlib.Path(sys.argv[1])
    # The device's threads, and what tracing a model of this kind leaves in caches.
    jax.block_until_ready(jax.device_put(np.ones(3)))
    nnx.eval_shape(lambda: Llama(load_config(path), rngs=None))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = kilobytes("VmRSS")
    model = load_model(path, dtype=jnp.dtype(sys.argv[2]))
    jax.block_until_ready(nnx.state(model))
    peak = kilobytes("VmHWM") - before
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    embedding = float(model.embed_tokens[...].sum())
    print(json.dumps({"peak": peak * 1024, "weights": weights, "embedding": embedding}))
"""


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    size, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_attention_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, size)}
    for layer in range(config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (heads, size)
        for name in ("q_norm", "k_norm"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (dim,)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{layer}.mlp.{name}.weight"] = (inner, size)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (size, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (size,)
    return shapes | {"model.norm.weight": (size,)}


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "float32"), ("bfloat16", "float32")], ids=["same", "wider"]
)
def test_the_peak_is_the_size_of_the_weights(
    tmp_path: pathlib.Path, stored: str, loaded: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG.to_json()))
    shapes = _shapes(_CONFIG)
    names, total = list(shapes), 0
    weight_map: dict[str, str] = {}
    for shard in range(2):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        mine = names[shard::2]
        tensors = {name: np.full(shapes[name], 0.5, jnp.dtype(stored)) for name in mine}
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(mine, file)
        total += sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = json.loads(run_python(_LOAD, str(tmp_path), loaded).stdout)
    assert found["weights"] == total * jnp.dtype(loaded).itemsize > 180e6
    assert found["embedding"] == 0.5 * _CONFIG.vocab_size * _CONFIG.hidden_size
    assert 0.9 < found["peak"] / found["weights"] < 1.1


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_tensors_of_all_types_and_shapes(tmp_path: pathlib.Path, stored: str) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3,), (1, 1), (5, 1), (300, 700), (1000, 1400)]  # the last is read in pieces
    tensors = {
        f"t{index}": jnp.asarray(rng.normal(size=shape), stored)
        for index, shape in enumerate(shapes)
    }
    save_flax(tensors, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        for name, tensor in tensors.items():
            for dtype in (stored, "float32", "bfloat16"):
                # Reading must leave the rows before and after unchanged.
                found = aligned_empty((tensor.shape[0] + 2, *tensor.shape[1:]), jnp.dtype(dtype))
                found[:] = 7
                file.read_into(name, found[1:-1])
                wanted = np.asarray(tensor).astype(jnp.dtype(dtype))
                np.testing.assert_array_equal(found[1:-1], wanted)
                assert (found[[0, -1]] == 7).all()


def test_a_file_that_is_cut_short_meanwhile(tmp_path: pathlib.Path) -> None:
    save_file({"t": np.ones((1000, 1000), np.float32)}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        with (tmp_path / "file").open("r+b") as other:
            other.truncate(2_000_000)
        for dtype in ("float32", "float16"):
            with pytest.raises(OSError, match="ends before its tensors do"):
                file.read_into("t", np.empty((1000, 1000), dtype))
