"""A run of the example: model, pool and engine from the command line's arguments, text and figures
to standard output.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_kvpage

from .arguments import BUNDLED, InputError, read_prompts, read_turns
from .beams import BeamEngine, BeamPrograms
from .checkpoint import CheckpointError, load_model
from .config import ConfigError, LlamaConfig, load_config
from .generate import Engine, Request
from .model import Llama
from .programs import Programs
from .report import figures, plot_memory, print_table, turn_figures
from .sampling import Sampling
from .stream import Printer
from .tokenizer import Tokenizer, TokenizerError
from .turns import ConversationEngine, next_turn

__all__ = ["run"]

_IMPLEMENTATIONS = {"cpu": ("cpu", "xla"), "gpu": ("cuda", "xla")}


def choose_sampling(args: argparse.Namespace) -> Sampling:
    """How to sample: greedy by default, but not for the small model with the built-in prompts: a
    greedy model of that size repeats itself."""
    demonstration = args.checkpoint == BUNDLED and not (args.prompt or args.prompt_file)
    temperature, top_p = (0.7, 0.9) if demonstration and args.temperature is None else (0.0, 1.0)
    if args.num_samples > 1 and not (temperature if args.temperature is None else args.temperature):
        raise InputError(
            "--num-samples needs a --temperature above 0: greedy samples are all equal"
        )
    return Sampling(
        temperature if args.temperature is None else args.temperature,
        args.top_k,
        top_p if args.top_p is None else args.top_p,
        args.seed,
    )


def make_requests(
    prompts: list[str],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    max_seq_len: int,
    num_samples: int = 1,
) -> list[Request]:
    """A request for each sample of each prompt; raises InputError for a prompt that leaves no room
    for a token."""
    requests = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt)
        if len(ids) >= max_seq_len:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens, but a sequence may have {max_seq_len} "
                "in all; shorten it or raise --max-seq-len"
            )
        group = index if num_samples > 1 else None
        requests += [
            Request(index * num_samples + sample, ids, max_new_tokens, group=group)
            for sample in range(num_samples)
        ]
    return requests


def tokens_of_turns(turns: list[list[int]], requests: list[Request], max_seq_len: int) -> int:
    """Tokens by which later turns may make a sequence longer; raises InputError if they may not
    fit."""
    if not turns:
        return 0
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    more = sum(len(ids) + longest.max_new_tokens for ids in turns)
    if len(longest.prompt_ids) + more >= max_seq_len:
        raise InputError(
            f"with {len(turns)} more turns the conversation of prompt {longest.index} may ask for "
            f"{len(longest.prompt_ids) + more} tokens, but a sequence may have {max_seq_len} in "
            "all; lower --max-new-tokens or raise --max-seq-len"
        )
    return more


def make_pool(
    args: argparse.Namespace,
    config: LlamaConfig,
    requests: list[Request],
    max_seq_len: int,
    later: int,
) -> jax_kvpage.KVPool:
    """A pool of the size of --capacity, or of what the requests can need together, with `later`
    tokens of each in later turns."""
    platform = jax.default_backend()
    block_tokens = args.block_tokens
    if block_tokens is None and args.checkpoint == BUNDLED and args.layout is None:
        # Blocks of the usual size would hold its whole context in a few: smaller ones show more.
        block_tokens = 16 if platform == "cpu" else None
    # Beams need new slots before old ones have drained.
    slots = 2 * args.num_beams if args.num_beams > 1 else len(requests)
    if args.num_beams > 1 and args.max_slots and args.max_slots < slots:
        raise InputError(f"--num-beams {args.num_beams} needs --max-slots {slots} or more")
    spec = jax_kvpage.CacheSpec(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_slots=args.max_slots or slots,
        max_seq_len=max_seq_len,
        dtype=jnp.dtype(args.kv_dtype or compute_dtype(args, config.dtype)),
        layout=args.layout,
        block_tokens=block_tokens,
    ).resolve("cuda" if platform == "gpu" else platform)
    capacity = args.capacity
    if capacity is None:
        ends = [min(len(r.prompt_ids) + r.max_new_tokens + later, max_seq_len) for r in requests]
        size = spec.block_tokens or 1
        needed = [-(-end // size) for end in ends]
        blocks = spec.num_ranges * (sum(needed) if args.num_beams == 1 else slots * max(needed))
        capacity = blocks * spec.block_bytes
    if str(capacity).isdecimal():
        capacity = int(capacity)
        if capacity >= 2**63:
            raise InputError(f"--capacity must be less than 2**63 bytes, got {capacity}")
    return jax_kvpage.KVPool(spec, capacity=capacity)


def compute_dtype(args: argparse.Namespace, stored: str) -> str:
    """Type of weights and arithmetic: as asked for, float32 on CPU (XLA's bfloat16 products are
    slow there), else as stored."""
    return args.dtype or ("float32" if jax.default_backend() == "cpu" else stored)


def make_engine(
    args: argparse.Namespace,
    model: Llama,
    pool: jax_kvpage.KVPool,
    sampling: Sampling,
    config: LlamaConfig,
    printer: Printer | None,
) -> tuple[Programs, Engine | BeamEngine]:
    """The engine that the arguments ask for, and its compiled programs."""
    stop_ids = config.eos_token_ids
    on_token = printer.token if printer else None
    on_finish = printer.finish if printer else None
    if args.num_beams > 1:
        beams = BeamPrograms(model, args.num_beams, stop_ids, args.implementation)
        return beams, BeamEngine(beams, pool, on_token=on_token, on_finish=on_finish)
    programs = Programs(model, sampling, stop_ids, args.implementation)
    engine = (ConversationEngine if args.turn else Engine)(
        programs,
        pool,
        stop_ids,
        scan_steps=args.scan,
        prefill_chunk=args.prefill_chunk,
        on_token=on_token,
        on_finish=on_finish,
    )
    return programs, engine


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Turns the library's errors about values from the command line into InputError."""
    try:
        yield
    except (ValueError, MemoryError, jax_kvpage.KVPageError) as error:
        raise InputError(str(error)) from error


def run(args: argparse.Namespace) -> None:
    """Does what the arguments say, and prints text and figures or one JSON object.

    Raises:
      InputError: With a line that says what is wrong with the input.
      OSError: The output or the plot cannot be written.
    """
    try:
        _run(args)
    except (ConfigError, CheckpointError, TokenizerError) as error:
        raise InputError(str(error)) from error


def _run(args: argparse.Namespace) -> None:
    platform = jax.default_backend()
    supported = _IMPLEMENTATIONS.get(platform, ())
    if args.implementation and args.implementation not in supported:
        raise InputError(
            f"--implementation {args.implementation} does not run on {platform}, "
            f"which has {' and '.join(supported)}"
        )
    with input_errors():
        sampling = choose_sampling(args)
    prompts = read_prompts(args)
    config = load_config(args.checkpoint)
    tokenizer = Tokenizer(args.checkpoint, config.vocab_size)
    max_seq_len = args.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.longest_sequence:
        raise InputError(
            f"--max-seq-len {max_seq_len} is beyond the {config.longest_sequence} positions "
            "that the model was made for"
        )
    requests = make_requests(prompts, tokenizer, args.max_new_tokens, max_seq_len, args.num_samples)
    texts = read_turns(args)
    turns = [tokenizer.encode(text, special=False) for text in texts]
    later = tokens_of_turns(turns, requests, max_seq_len)
    model = load_model(args.checkpoint, dtype=jnp.dtype(compute_dtype(args, config.dtype)))
    with input_errors():
        pool = make_pool(args, config, requests, max_seq_len, later)
    with pool:
        repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
        printer = None if args.json else Printer(requests, repeated, tokenizer)
        programs, engine = make_engine(args, model, pool, sampling, config, printer)
        begin = time.monotonic()
        engine.run(requests)
        answered = [requests]
        for text, ids in zip(texts, turns, strict=True):
            answered.append(next_turn(answered[-1], ids))
            if printer:
                printer.start(answered[-1], [text] * len(requests))
            engine.run(answered[-1])
        requests = [request for turn in answered for request in turn]
        seconds = time.monotonic() - begin
        values = figures(
            engine, requests, pool.spec, pool.stats(), seconds, programs.compile_seconds
        )
    if turns:
        values["turns"] = turn_figures(answered)
    for request in requests:
        if request.finish_reason == "capacity":
            print(
                f"decode_llama.py: sequence {request.index} ended at {len(request.tokens)} tokens: "
                f"even alone it does not fit in {pool.spec.block_tokens}-token blocks of "
                f"{values['capacity']} bytes in all; raise --capacity",
                file=sys.stderr,
            )
    if args.json:
        print(json.dumps({"sequences": _sequences(requests, engine, tokenizer), **values}))
    else:
        print_table(values)
    # Last: if it fails after all, the results have been shown.
    if args.plot:
        print(end="", flush=True)
        plot_memory(engine, values, args.plot)


def _sequences(
    requests: list[Request], engine: Engine | BeamEngine, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The results of all requests, as --json prints them; with --num-beams also all finished
    sequences of the search and their scores, the best first. With --turn the requests of the turns
    follow each other, each with the number of its tokens that the cache had.
    """
    sequences: list[dict[str, Any]] = [
        {
            "prompt_ids": request.prompt_ids,
            "output_ids": request.output_ids,
            "text": tokenizer.continuation(request.prompt_ids, request.output_ids),
            "finish_reason": request.finish_reason,
        }
        for request in requests
    ]
    if isinstance(engine, ConversationEngine):
        for sequence, request in zip(sequences, requests, strict=True):
            sequence["cached_tokens"] = request.cached_tokens
    if isinstance(engine, BeamEngine):
        for sequence, found in zip(sequences, engine.hypotheses, strict=True):
            sequence["beams"] = [dataclasses.asdict(hypothesis) for hypothesis in found]
    return sequences
