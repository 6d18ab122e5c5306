"""A Llama of 56M parameters with random weights, for comparisons with other engines."""

from __future__ import annotations

import pathlib
import shutil
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

__all__ = ["VOCABULARY", "write_checkpoint"]

VOCABULARY = 32000


def write_checkpoint(folder: str) -> None:
    """Writes the model as a Hugging Face checkpoint in float32, with the bundled model's tokenizer.

    The tokenizer has fewer tokens than the model: servers have no text for the others.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from llama.arguments import BUNDLED
    from llama.checkpoint import save_model
    from llama.config import LlamaConfig
    from llama.model import Llama

    config = LlamaConfig(VOCABULARY, 512, 1408, 8, 8, 4, 64, max_position_embeddings=4096)
    model = nnx.eval_shape(lambda: Llama(config, rngs=None))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    values = jax.tree.map(
        lambda leaf: (
            jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32))
            if len(leaf.shape) > 1
            else jnp.ones(leaf.shape)
        ),
        state,
    )
    save_model(nnx.merge(graph, values), folder, dtype=jnp.float32)
    for path in BUNDLED.glob("tokenizer*"):
        shutil.copy(path, folder)
