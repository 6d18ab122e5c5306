"""Loads a checkpoint into an engine, with a description of the model for the server."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
from llama.arguments import BUNDLED, InputError
from llama.checkpoint import CheckpointError, load_model
from llama.config import ConfigError, load_config
from llama.pools import make_pool, open_store
from llama.run import input_errors
from llama.serving import model_step
from llama.tokenizer import Tokenizer, TokenizerError

import jax_kvpage
from jax_kvpage.serving import Engine, EngineConfig

from .model import ServedModel

__all__ = ["Loaded", "Options", "load"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes of an engine.

    Attributes:
      max_num_seqs: The most sequences at a time.
      max_num_batched_tokens: The most tokens in a step.
      max_seq_len: The most tokens of a sequence; None for the model's max_position_embeddings.
      capacity: Physical memory of the pool; None for half of what all slots could take.
      block_tokens: Tokens in a block; None for the default.
      buckets: Shapes of steps; None for the default.
      max_logprobs: The most logprobs of a token.
      num_speculative_tokens: Tokens to guess by prompt lookup.
      prefix_caching: Whether prompts reuse cached prefixes.
      store: Directory of the store for evicted prefixes and swapped sequences, or None.
      store_limit: The most that the store may use.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 128
    max_seq_len: int | None = None
    capacity: str | None = None
    block_tokens: int | None = None
    buckets: tuple[tuple[int, int], ...] | None = None
    max_logprobs: int = 20
    num_speculative_tokens: int = 0
    prefix_caching: bool = True
    store: pathlib.Path | None = None
    store_limit: str = "8GiB"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded model, yielded by `load`.

    Attributes:
      engine: The engine, not warmed up.
      pool: The engine's pool.
      model: The model's description for the server.
    """

    engine: Engine
    pool: jax_kvpage.KVPool
    model: ServedModel


@contextlib.contextmanager
def load(checkpoint: pathlib.Path, options: Options, name: str | None = None) -> Iterator[Loaded]:
    """Loads a checkpoint; closes the engine and the pool at the end.

    Args:
      checkpoint: A Hugging Face model directory.
      options: Sizes of the engine.
      name: The model's name in requests; by default the directory's.

    Raises:
      InputError: The checkpoint or the sizes are invalid or not supported.
    """
    try:
        config = load_config(checkpoint)
        tokenizer = Tokenizer(checkpoint, config.vocab_size)
        template = ServedModel.find_template(checkpoint)
        model = load_model(checkpoint, dtype=jnp.float32)
    except (ConfigError, CheckpointError, TokenizerError) as error:
        raise InputError(str(error)) from error
    with contextlib.ExitStack() as stack:
        with input_errors():
            store = None
            if options.store is not None:
                opened = open_store(options.store, options.store_limit, checkpoint)
                store = stack.enter_context(opened)
            pool = make_pool(
                config,
                options.max_num_seqs,
                options.max_seq_len,
                options.block_tokens or (16 if checkpoint == BUNDLED else None),
                options.capacity,
                store=store,
            )
            stack.enter_context(pool)
        engine_config = EngineConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=max(options.max_num_batched_tokens, options.max_num_seqs),
            buckets=options.buckets,
            eos_token_ids=tuple(config.eos_token_ids),
            max_logprobs=options.max_logprobs,
            num_speculative_tokens=options.num_speculative_tokens,
            prefix_caching=options.prefix_caching,
            # The same for all servers that share a store; its fingerprint distinguishes models.
            namespace=None if store is None else "openai_server",
        )
        step, weights = model_step(model)
        served = ServedModel(
            name=name or checkpoint.resolve().name,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            max_seq_len=pool.spec.max_seq_len,
            template=template,
        )
        engine = Engine(step, weights, pool, engine_config, detokenize=tokenizer.decode)
        yield Loaded(stack.enter_context(engine), pool, served)
