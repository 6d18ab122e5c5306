"""Runs the example: makes model, pool and engine from the command-line arguments, and prints text
and statistics to standard output.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_kvpage
from jax_kvpage.serving import DraftModel

from .arguments import BUNDLED, InputError, talks
from .checkpoint import CheckpointError, load_model
from .config import ConfigError, LlamaConfig, load_config
from .engine_runner import EngineRunner
from .mesh import make_mesh, pool_bytes, sharded_step
from .mesh_programs import ShardedPrograms
from .model import Llama
from .pools import make_spec, open_pool, sequence_length
from .programs import Programs
from .report import figures, plot_memory, print_table, turn_figures
from .sampling import Sampling
from .scan_runner import Request, ScanRunner
from .script import make_script
from .serving import make_draft, model_step
from .stream import Printer
from .tokenizer import Tokenizer, TokenizerError
from .turns import ConversationRunner

__all__ = ["run"]

_DRAFTED = 4  # tokens that a draft model guesses per step
_IMPLEMENTATIONS = {"cpu": ("cpu", "xla"), "gpu": ("cuda", "xla")}


def choose_sampling(args: argparse.Namespace) -> Sampling:
    """Chooses how to sample: greedy by default, except for the small model with the built-in
    prompts, because so small a model repeats itself in greedy mode."""
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
        args.num_samples,
    )


def make_pool(
    args: argparse.Namespace,
    config: LlamaConfig,
    requests: list[Request],
    max_seq_len: int,
    later: int,
    mesh: jax.sharding.Mesh | None,
) -> jax_kvpage.KVPool:
    """Makes a pool of size --capacity, or large enough for all requests together, with `later` more
    tokens for each in later turns; without requests, for one sequence of full length. With
    replicas, each has that size."""
    # Beam search needs new slots before old ones have drained.
    slots = 2 * args.num_beams if args.num_beams > 1 else max(len(requests), 1)
    replicas = args.mesh.dp
    most = args.max_slots or slots * replicas
    if most % replicas:
        raise InputError(f"--max-slots {most} cannot be split over the {replicas} replicas")
    if args.num_beams > 1 and most < slots * replicas:
        raise InputError(
            f"--num-beams {args.num_beams} needs --max-slots {slots * replicas} or more"
        )
    if not args.scan and most < args.num_samples * replicas:
        raise InputError(
            f"the samples of a prompt run together: --num-samples {args.num_samples} needs "
            f"--max-slots {args.num_samples * replicas} or more"
        )
    dtype = args.kv_dtype or compute_dtype(args, config.dtype)
    size = block_tokens(args)
    spec = make_spec(config, most, max_seq_len, size, dtype, args.layout)
    capacity = args.capacity
    if capacity is None:
        ends = [min(len(r.prompt_ids) + r.max_new_tokens + later, max_seq_len) for r in requests]
        size = spec.block_tokens or 1
        needed = [-(-end // size) for end in ends or [max_seq_len]]
        blocks = spec.num_ranges * (sum(needed) if args.num_beams == 1 else slots * max(needed))
        capacity = str(pool_bytes(spec, blocks, args.mesh))
    return open_pool(spec, capacity, mesh)


def block_tokens(args: argparse.Namespace) -> int | None:
    """Tokens in a block. With the default size, a few blocks would hold the small model's entire
    context; smaller blocks show more."""
    small = args.checkpoint == BUNDLED and args.layout is None and jax.default_backend() == "cpu"
    return args.block_tokens or (16 if small else None)


def compute_dtype(args: argparse.Namespace, stored: str) -> str:
    """Type of weights and arithmetic: as requested, else float32 on CPU (where XLA's bfloat16
    products are slow), else as stored."""
    return args.dtype or ("float32" if jax.default_backend() == "cpu" else stored)


def make_engine(
    args: argparse.Namespace,
    model: Llama,
    pool: jax_kvpage.KVPool,
    sampling: Sampling,
    config: LlamaConfig,
    printer: Printer | None,
    draft: DraftModel | None,
    mesh: jax.sharding.Mesh | None,
) -> ScanRunner | EngineRunner:
    """Makes the engine for the arguments."""
    stop_ids = config.eos_token_ids
    on_token = printer.token if printer else None
    on_finish = printer.finish if printer else None
    if not args.scan:
        if mesh is None:
            step, weights = model_step(model, args.implementation)
        else:
            step, weights = sharded_step(model, mesh, args.implementation)
        return EngineRunner(
            step,
            weights,
            pool,
            sampling,
            stop_ids,
            num_beams=args.num_beams,
            prefill_chunk=args.prefill_chunk,
            num_guesses=_DRAFTED if draft else args.prompt_lookup,
            draft=draft,
            conversations=bool(args.turn) or talks(args),
            on_token=on_token,
            on_finish=on_finish,
        )
    programs: Programs
    if mesh is None:
        programs = Programs(model, sampling, stop_ids, args.implementation)
    else:
        programs = ShardedPrograms(model, mesh, sampling, stop_ids, args.implementation)
    return (ConversationRunner if args.turn else ScanRunner)(
        programs,
        pool,
        stop_ids,
        scan_steps=args.scan,
        prefill_chunk=args.prefill_chunk,
        on_token=on_token,
        on_finish=on_finish,
    )


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Converts the library's errors about command-line values to InputError."""
    try:
        yield
    except (ValueError, MemoryError, jax_kvpage.KVPageError) as error:
        raise InputError(str(error)) from error


def run(args: argparse.Namespace) -> None:
    """Runs the command, and prints text and statistics or one JSON object.

    Raises:
      InputError: A mistake in the input; the message is one line.
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
    config = load_config(args.checkpoint)
    tokenizer = Tokenizer(args.checkpoint, config.vocab_size)
    max_seq_len = sequence_length(config, args.max_seq_len)
    script = make_script(args, config, tokenizer, max_seq_len)
    model = load_model(args.checkpoint, dtype=jnp.dtype(compute_dtype(args, config.dtype)))
    with contextlib.ExitStack() as stack:
        with input_errors():
            mesh = None
            if args.mesh.devices > 1:
                mesh = make_mesh(args.mesh.tp, config, args.mesh.dp)
            pool = make_pool(args, config, script.first, max_seq_len, script.later, mesh)
            stack.enter_context(pool)
            draft = None
            if args.draft:
                draft = make_draft(args.draft, config, pool, block_tokens(args))
                stack.enter_context(draft.pool)
        printer = None if args.json else Printer([], [], tokenizer)
        engine = make_engine(args, model, pool, sampling, config, printer, draft, mesh)
        if isinstance(engine, EngineRunner):
            stack.enter_context(engine)
        answered, seconds = [], 0.0
        for requests, leads in script.turns():
            begin = time.monotonic()
            if printer:
                printer.start(requests, leads)
            if isinstance(engine, EngineRunner):
                engine.run(requests, script.interrupted)
            else:
                engine.run(requests)
            answered.append(requests)
            seconds += time.monotonic() - begin
        if not answered:
            return  # Ctrl-D before the first message
        requests = [request for turn in answered for request in turn]
        values = figures(engine, requests, pool.spec, pool.stats(), seconds)
    conversations = bool(args.turn) or talks(args)
    if conversations:
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
        sequences = _sequences(requests, engine, tokenizer, conversations)
        print(json.dumps({"sequences": sequences, **values}))
    else:
        print_table(values)
    # Plot last: if it fails, the results have been shown.
    if args.plot:
        print(end="", flush=True)
        plot_memory(engine, values, args.plot)


def _sequences(
    requests: list[Request],
    engine: ScanRunner | EngineRunner,
    tokenizer: Tokenizer,
    conversations: bool,
) -> list[dict[str, Any]]:
    """The results of all requests for --json. With --num-beams they include all finished sequences
    of the search and their scores, best first. In conversations, the requests of all turns follow
    each other, each with the number of its cached tokens.
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
    if conversations:
        for sequence, request in zip(sequences, requests, strict=True):
            sequence["cached_tokens"] = request.cached_tokens
    if isinstance(engine, EngineRunner) and engine.hypotheses:
        for sequence, found in zip(sequences, engine.hypotheses, strict=True):
            sequence["beams"] = found
    return sequences
