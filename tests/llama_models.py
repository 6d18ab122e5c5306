"""Small random Llamas on disk and in memory, and an engine for them, for tests of the example."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from llama.checkpoint import save_model
from llama.config import LlamaConfig
from llama.engine_runner import EngineRunner
from llama.model import Llama
from llama.programs import Programs
from llama.sampling import Sampling
from llama.scan_runner import Request, ScanRunner
from llama.serving import model_step
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jax_kvpage as kvp

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
# With random weights, a tied head mostly repeats its input; the text of this one varies.
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)


def random_model(config: LlamaConfig = TINY, seed: int = 0, scale: float = 4.0) -> Llama:
    """A model whose weights are larger than at the start of training, so that its output varies."""
    model = Llama(config, rngs=nnx.Rngs(seed))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, state))
    return model


def write_checkpoint(
    path: pathlib.Path, config: LlamaConfig = TINY, *, dtype: object = jnp.float32, shards: int = 1
) -> Llama:
    """Writes a random model and a byte tokenizer to `path`, in one file, or in several with an
    index.
    """
    model = random_model(config)
    save_model(model, path, dtype=jnp.dtype(dtype))
    write_byte_tokenizer(path)
    if shards > 1:
        single = path / "model.safetensors"
        tensors = load_file(single)
        single.unlink()
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            names = sorted(tensors)[shard::shards]
            save_file({name: tensors[name] for name in names}, path / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def write_byte_tokenizer(path: pathlib.Path) -> None:
    """Writes a tokenizer.json whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def edit_json(file: pathlib.Path, **changes: object) -> None:
    """Sets keys of a JSON object in a file; None removes a key."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def cache_spec(
    config: LlamaConfig,
    *,
    max_slots: int,
    max_seq_len: int | None = None,
    layout: str | None = None,
    block_tokens: int | None = None,
    dtype: object = jnp.float32,
) -> kvp.CacheSpec:
    """Returns the resolved spec of a cache for `config`."""
    spec = kvp.CacheSpec(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        max_slots,
        max_seq_len or config.max_position_embeddings,
        dtype=jnp.dtype(dtype),
        layout=layout,
        block_tokens=block_tokens,
    )
    return spec.resolve("cpu")


@dataclasses.dataclass
class Outcome:
    """The results of a run of the engine."""

    outputs: list[list[int]]
    reasons: list[str | None]
    requests: list[Request]
    order: list[int]  # the request of each token, in the order of arrival
    engine: ScanRunner | EngineRunner
    stats: kvp.PoolStats


@functools.lru_cache(maxsize=4)
def _programs(
    model: Llama, sampling: Sampling, stop_ids: tuple[int, ...], implementation: str | None
) -> Programs:
    """Compiled programs serve every pool of one spec, so tests share them."""
    return Programs(model, sampling, stop_ids, implementation)


# One function object per model: tests that share compiled programs find them by it.
served_step = functools.lru_cache(maxsize=4)(model_step)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    spec: kvp.CacheSpec,
    blocks: int | None = None,
    max_new_tokens: int | Sequence[int] = 24,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] = (),
    scan_steps: int = 0,
    prefill_chunk: int = 512,
    implementation: str | None = None,
) -> Outcome:
    """Runs an engine over `prompts` in a pool of `blocks` blocks (None: enough for all): the
    library's engine, or with `scan_steps` the one behind --scan.
    """
    limits = np.broadcast_to(np.asarray(max_new_tokens), len(prompts))
    requests = [
        Request(index, list(prompt), int(limit))
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    capacity = spec.virtual_bytes if blocks is None else blocks * spec.block_bytes
    sampling, order = sampling or Sampling(), list[int]()
    options: dict[str, Any] = {
        "prefill_chunk": prefill_chunk,
        "on_token": lambda request, token: order.append(request.index),
    }
    engine: ScanRunner | EngineRunner
    with kvp.KVPool(spec, capacity) as pool:
        if scan_steps:
            programs = _programs(model, sampling, stop_ids, implementation)
            engine = ScanRunner(programs, pool, stop_ids, scan_steps=scan_steps, **options)
        else:
            step = served_step(model, implementation)
            engine = EngineRunner(*step, pool, sampling, stop_ids, **options)
        engine.run(requests)
        stats = pool.stats()
    return Outcome(
        [request.output_ids for request in requests],
        [request.finish_reason for request in requests],
        requests,
        order,
        engine,
        stats,
    )
