"""Generates text with a Llama whose KV cache is mapped block by block while it grows.

    python examples/decode_llama.py                     # the small model of this repository
    python examples/decode_llama.py --prompt "The module" --temperature 0.8 --seed 3
    python examples/decode_llama.py --checkpoint DIR --prompt "Once upon a time" --scan 16

DIR is a Hugging Face model directory of the Llama architecture: config.json, safetensors,
tokenizer.json.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from llama.checkpoint import CheckpointError, load_model
from llama.config import ConfigError, LlamaConfig, load_config
from llama.generate import Engine, Request
from llama.programs import Programs
from llama.report import figures, plot_memory, print_table
from llama.sampling import Sampling
from llama.stream import Printer
from llama.tokenizer import Tokenizer, TokenizerError

import jax_kvpage

_BUNDLED = pathlib.Path(__file__).resolve().parent / "tiny_llama"
_DEFAULT_PROMPTS = (
    "This function is called when",
    "If the file does not exist,",
    "A class is",
    "When a function is called,",
)
_DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = (*_DTYPES, "int8", "float8_e4m3fn")
_IMPLEMENTATIONS = {"cpu": ("cpu", "xla"), "gpu": ("cuda", "xla")}
_PLOT_ENDINGS = (".png", ".pdf", ".svg")


class InputError(ValueError):
    """Invalid arguments that are only detected when they are used."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 on a mistake."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to generate")
    what.add_argument("--checkpoint", type=pathlib.Path, default=_BUNDLED, metavar="DIR")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    what.add_argument("--prompt-file", type=pathlib.Path, metavar="FILE", help="one prompt a line")
    what.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    what.add_argument("--temperature", type=float, help="0 (default) is greedy")
    what.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default) is all")
    what.add_argument("--top-p", type=float, metavar="P", help="1 (default) is all")
    what.add_argument("--seed", type=int, default=0)

    how = parser.add_argument_group("how to run")
    how.add_argument("--scan", type=int, default=0, metavar="N", help="decode steps in one program")
    how.add_argument("--dtype", choices=_DTYPES, help="weights and arithmetic; float32 on CPU")
    how.add_argument(
        "--kv-dtype", choices=_KV_DTYPES, help="storage of keys and values; as --dtype"
    )
    how.add_argument("--layout", choices=("fused", "per_layer"), help="of the cache's memory")
    how.add_argument("--block-tokens", type=int, metavar="N", help="tokens in a block")
    how.add_argument("--capacity", metavar="SIZE", help='physical memory, such as "64MiB" or bytes')
    how.add_argument("--max-slots", type=_positive, metavar="N", help="sequences at a time")
    how.add_argument("--max-seq-len", type=_positive, metavar="N", help="the model's by default")
    how.add_argument("--prefill-chunk", type=_positive, default=512, metavar="N")
    how.add_argument("--implementation", choices=("cpu", "cuda", "xla"), help="of attention")

    out = parser.add_argument_group("what to show")
    out.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    out.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="memory over time")
    args = parser.parse_args(argv)
    if args.scan < 0:
        parser.error(f"--scan must be 0 (a Python loop) or more, got {args.scan}")
    if args.plot and args.plot.suffix not in _PLOT_ENDINGS:
        parser.error(f"--plot {args.plot}: the name must end in one of {', '.join(_PLOT_ENDINGS)}")
    if args.plot and not args.plot.absolute().parent.is_dir():
        parser.error(f"--plot {args.plot}: there is no directory {args.plot.absolute().parent}")
    return args


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then those of the file; built-in ones if there are none."""
    prompts = list(args.prompt)
    if args.prompt_file:
        try:
            lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file: {error}") from error
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise InputError(f"--prompt-file {args.prompt_file} holds no prompts")
        prompts += lines
    return prompts or list(_DEFAULT_PROMPTS)


def choose_sampling(args: argparse.Namespace) -> Sampling:
    """How to sample: greedy by default. The demonstration (no checkpoint and no prompts) uses a
    temperature, because so small a model repeats itself without one."""
    demonstration = args.checkpoint == _BUNDLED and not (args.prompt or args.prompt_file)
    temperature, top_p = (0.7, 0.9) if demonstration and args.temperature is None else (0.0, 1.0)
    return Sampling(
        temperature if args.temperature is None else args.temperature,
        args.top_k,
        top_p if args.top_p is None else args.top_p,
        args.seed,
    )


def make_requests(
    prompts: list[str], tokenizer: Tokenizer, max_new_tokens: int, max_seq_len: int
) -> list[Request]:
    """A request for each prompt; raises InputError for one that leaves no room for a token."""
    requests = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt)
        if len(ids) >= max_seq_len:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens, but a sequence may have {max_seq_len} "
                "in all; shorten it or raise --max-seq-len"
            )
        requests.append(Request(index, ids, max_new_tokens))
    return requests


def make_pool(
    args: argparse.Namespace, config: LlamaConfig, requests: list[Request], max_seq_len: int
) -> jax_kvpage.KVPool:
    """A pool of --capacity, or by default of the most memory that the requests can need."""
    platform = jax.default_backend()
    block_tokens = args.block_tokens
    if block_tokens is None and args.checkpoint == _BUNDLED and args.layout is None:
        # Its whole context fits a few blocks of the usual size: smaller ones show more.
        block_tokens = 16 if platform == "cpu" else None
    spec = jax_kvpage.CacheSpec(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_slots=args.max_slots or len(requests),
        max_seq_len=max_seq_len,
        dtype=jnp.dtype(args.kv_dtype or compute_dtype(args, config.dtype)),
        layout=args.layout,
        block_tokens=block_tokens,
    ).resolve("cuda" if platform == "gpu" else platform)
    capacity = args.capacity
    if capacity is None:
        ends = [min(len(r.prompt_ids) + r.max_new_tokens, max_seq_len) for r in requests]
        size = spec.block_tokens or 1
        blocks = spec.num_ranges * sum(-(-end // size) for end in ends)
        capacity = blocks * spec.block_bytes
    return jax_kvpage.KVPool(spec, capacity=int(capacity) if str(capacity).isdigit() else capacity)


def compute_dtype(args: argparse.Namespace, stored: str) -> str:
    """Type of weights and arithmetic: as asked for, float32 on CPU (XLA's bfloat16 products are
    slow there), else as stored."""
    return args.dtype or ("float32" if jax.default_backend() == "cpu" else stored)


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Turns the library's errors about command-line values into InputError."""
    try:
        yield
    except (ValueError, MemoryError, jax_kvpage.KVPageError) as error:
        raise InputError(str(error)) from error


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns the figures for --json.

    Raises:
      ValueError: With one line about the invalid input.
    """
    platform = jax.default_backend()
    supported = _IMPLEMENTATIONS.get(platform, ())
    if args.implementation and args.implementation not in supported:
        raise InputError(
            f"--implementation {args.implementation} does not run on {platform}, "
            f"which has {' and '.join(supported)}"
        )
    with _input_errors():
        sampling = choose_sampling(args)
    prompts = read_prompts(args)
    config = load_config(args.checkpoint)
    tokenizer = Tokenizer(args.checkpoint, config.vocab_size)
    max_seq_len = args.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.max_position_embeddings:
        raise InputError(
            f"--max-seq-len {max_seq_len} is beyond the {config.max_position_embeddings} positions "
            "that the model was made for (max_position_embeddings)"
        )
    requests = make_requests(prompts, tokenizer, args.max_new_tokens, max_seq_len)
    model = load_model(args.checkpoint, dtype=jnp.dtype(compute_dtype(args, config.dtype)))
    with _input_errors():
        pool = make_pool(args, config, requests, max_seq_len)
    with pool:
        programs = Programs(model, sampling, config.eos_token_ids, args.implementation)
        printer = None if args.json else Printer(requests, prompts, tokenizer)
        engine = Engine(
            programs,
            pool,
            config.eos_token_ids,
            scan_steps=args.scan,
            prefill_chunk=args.prefill_chunk,
            on_token=printer.token if printer else None,
            on_finish=printer.finish if printer else None,
        )
        begin = time.monotonic()
        engine.run(requests)
        seconds = time.monotonic() - begin
        values = figures(
            engine, requests, pool.spec, pool.stats(), seconds, programs.compile_seconds
        )
    for request in requests:
        if request.finish_reason == "capacity":
            print(
                f"decode_llama.py: sequence {request.index} ended at {len(request.tokens)} tokens: "
                f"even alone it does not fit in {pool.spec.block_tokens}-token blocks of "
                f"{values['capacity']} bytes in all; raise --capacity",
                file=sys.stderr,
            )
    if args.plot:
        plot_memory(engine, values, args.plot)
    if printer:
        print_table(values)
    sequences = [
        {
            "prompt_ids": request.prompt_ids,
            "output_ids": request.output_ids,
            "text": tokenizer.continuation(request.prompt_ids, request.output_ids),
            "finish_reason": request.finish_reason,
        }
        for request in requests
    ]
    return {"sequences": sequences, **values}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse_arguments(argv)
    try:
        result = run(args)
    except (InputError, ConfigError, CheckpointError, TokenizerError) as error:
        line = " ".join(str(error).split())
        print(f"decode_llama.py: error: {line}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
