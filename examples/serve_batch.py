"""Serves many requests with `jax_kvpage.serving.Engine` and prints statistics.

    python examples/serve_batch.py                                  # built-in prompts, small model
    python examples/serve_batch.py --num-requests 64 --capacity 1MiB --plot occupancy.png
    python examples/serve_batch.py --prompt-file prompts.txt --checkpoint DIR --draft DIR2
    python examples/serve_batch.py --trace azure2023_conv.csv.gz --shrink 16 --speed 10

A trace gives lengths and arrival times (Azure's LLM inference traces or Mooncake's JSON lines); the
tokens are random. DIR is a model directory as for decode_llama.py.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from llama.arguments import BUNDLED, InputError, plot_problem, positive
from llama.prompts import read_prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for a mistake in the input, or 130 for an interrupt."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (InputError, OSError) as error:
        print(f"serve_batch.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("serve_batch.py: interrupted", file=sys.stderr)
        return 130
    return 0


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "serve_batch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = "Hugging Face model directory (default: the small model of this repository)"
    add("--checkpoint", type=pathlib.Path, default=BUNDLED, metavar="DIR", help=what)
    add("--prompt", action="append", default=[], metavar="TEXT", help="prompt; repeatable")
    what = "UTF-8 text with one prompt per line"
    add("--prompt-file", type=pathlib.Path, metavar="FILE", help=what)
    what = "lengths and arrival times of requests, instead of prompts"
    add("--trace", type=pathlib.Path, metavar="FILE", help=what)
    what = "number of requests; prompts repeat (default: each prompt once, 100 of a trace)"
    add("--num-requests", type=positive, metavar="N", help=what)
    what = "divide all lengths of a trace (default: %(default)s)"
    add("--shrink", type=positive, default=1, metavar="N", help=what)
    what = "divide all times of a trace; 0: all arrive at once (default: %(default)s)"
    add("--speed", type=_not_negative, default=0.0, metavar="X", help=what)
    what = "maximum number of tokens to generate per prompt (default: %(default)s)"
    add("--max-new-tokens", type=positive, default=128, metavar="N", help=what)
    what = "0 takes the most likely token (default: %(default)s)"
    add("--temperature", type=float, default=0.7, metavar="T", help=what)
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely; 0: all")
    add(
        "--top-p",
        type=float,
        default=0.9,
        metavar="P",
        help="nucleus sampling (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    what = "maximum number of running sequences (default: %(default)s)"
    add("--max-num-seqs", type=positive, default=16, metavar="N", help=what)
    what = "maximum number of tokens per step (default: %(default)s)"
    add("--max-num-batched-tokens", type=positive, default=128, metavar="N", help=what)
    what = "maximum tokens per sequence (default: the model's max_position_embeddings)"
    add("--max-seq-len", type=positive, metavar="N", help=what)
    what = "physical memory of the pool (default: half of what all slots can hold)"
    add("--capacity", metavar="SIZE", help=what)
    what = "tokens per block (default: 16 for the small model, else chosen by jax_kvpage)"
    add("--block-tokens", type=positive, metavar="N", help=what)
    what = "tokens to guess by prompt lookup and verify per step (default: none, 4 with --draft)"
    add("--num-speculative-tokens", type=positive, metavar="N", help=what)
    what = "smaller model with the same vocabulary that guesses instead of prompt lookup"
    add("--draft", type=pathlib.Path, metavar="DIR", help=what)
    add("--no-prefix-caching", action="store_true", help="compute every prompt")
    what = "directory for prefixes and sequences that memory has no room for; kept between runs"
    add("--store", type=pathlib.Path, metavar="DIR", help=what)
    what = "size limit of --store (default: %(default)s)"
    add("--store-limit", default="8GiB", metavar="SIZE", help=what)
    add("--json", action="store_true", help="print one JSON object")
    what = "draw the occupancy of blocks over time, by request (needs matplotlib)"
    add("--plot", type=pathlib.Path, metavar="FILE", help=what)
    return parser


def _run(args: argparse.Namespace) -> None:
    """Runs the engine; prints the statistics and the generated texts."""
    problem = plot_problem(args.plot) if args.plot else None
    if problem:
        raise InputError(f"--plot {args.plot}: {problem}")
    import jax.numpy as jnp
    from llama.checkpoint import CheckpointError, load_model
    from llama.config import ConfigError, load_config
    from llama.pools import make_pool, open_store
    from llama.run import input_errors
    from llama.serving import figures, make_draft, model_step, plot_occupancy, serve
    from llama.tokenizer import Tokenizer, TokenizerError
    from rich.console import Console
    from rich.progress import Progress

    from jax_kvpage.serving import Engine, EngineConfig, SamplingParams

    with input_errors():
        params = SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            ignore_eos=args.trace is not None,
        )
    try:
        config = load_config(args.checkpoint)
        tokenizer = Tokenizer(args.checkpoint, config.vocab_size)
        model = load_model(args.checkpoint, dtype=jnp.float32)
        jobs = _jobs(args, tokenizer, config.vocab_size)
    except (ConfigError, CheckpointError, TokenizerError) as error:
        raise InputError(str(error)) from error
    with input_errors():
        block_tokens = args.block_tokens or (16 if args.checkpoint == BUNDLED else None)
        rows = args.max_num_seqs
        store = open_store(args.store, args.store_limit, args.checkpoint) if args.store else None
        pool = make_pool(config, rows, args.max_seq_len, block_tokens, args.capacity, store=store)
        draft = make_draft(args.draft, config, pool, block_tokens) if args.draft else None
    step, weights = model_step(model)
    options = EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(args.max_num_batched_tokens, args.max_num_seqs),
        eos_token_ids=tuple(config.eos_token_ids),
        prefix_caching=not args.no_prefix_caching,
        num_speculative_tokens=args.num_speculative_tokens or (4 if draft else 0),
        namespace="serve_batch" if store else None,  # the same in later runs
    )
    detokenize = None if args.trace else tokenizer.decode
    progress = Progress(console=Console(stderr=True), disable=args.json)
    engine = Engine(step, weights, pool, options, detokenize=detokenize, draft=draft)
    nothing = contextlib.nullcontext()
    with store or nothing, pool, draft.pool if draft else nothing, engine, progress:
        begin = time.monotonic()
        compiling = progress.add_task("compiling", total=None)
        engine.warm_up(lambda done, total: progress.update(compiling, completed=done, total=total))
        compile_seconds = time.monotonic() - begin
        serving = progress.add_task("requests", total=len(jobs))
        result = serve(engine, jobs, params, lambda count: progress.advance(serving, count))
        values = figures(result, engine, pool.spec, pool.stats(), compile_seconds)
    for refusal in result.refusals:
        print(f"serve_batch.py: refused: {refusal}", file=sys.stderr)
    outputs = [] if args.trace else [output for output in result.outputs if output is not None]
    texts = [output.outputs[0].text for output in outputs]
    if args.json:
        print(json.dumps({**values, "texts": texts}))
    else:
        _print(values, texts)
    # Plot last: if it fails, the results have been shown.
    if args.plot:
        print(end="", flush=True)
        plot_occupancy(result, args.plot)


def _jobs(args: argparse.Namespace, tokenizer: Any, vocab_size: int) -> list[Any]:
    from llama.workload import Job, read_trace, trace_jobs

    if args.trace:
        rows = read_trace(args.trace, args.num_requests or 100)
        return trace_jobs(rows, vocab_size, args.shrink, args.speed, args.seed)
    prompts = read_prompts(args)
    count = args.num_requests or len(prompts)
    ids = [tokenizer.encode(prompts[i % len(prompts)]) for i in range(count)]
    return [Job(0.0, each, args.max_new_tokens) for each in ids]


def _print(values: dict[str, Any], texts: list[str]) -> None:
    """Prints some of the texts, and the table."""
    from rich.console import Console
    from rich.table import Table

    for text in texts[:3]:
        print(f"> {text.strip()}\n")
    table = Table(title="What it took", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    v = values
    reasons = ", ".join(f"{count} {reason}" for reason, count in v["finish_reasons"].items())
    for name, value in (
        ("requests", f"{v['requests']} ({reasons}; {v['refused']} refused)"),
        ("prompt tokens", f"{v['prompt_tokens']:,}, {v['cached_tokens']:,} cached"),
        ("generated tokens", f"{v['generated_tokens']:,}"),
        ("time", f"{v['seconds']:.2f} s (and {v['compile_seconds']:.2f} s compiling)"),
        ("generated tokens/s", f"{v['generated_per_second']:,.1f}"),
        ("all tokens/s", f"{v['tokens_per_second']:,.1f}"),
        ("first token, p50 / p99", f"{v['first_token_ms_p50']} / {v['first_token_ms_p99']} ms"),
        (
            "between tokens, p50 / p99",
            f"{v['between_tokens_ms_p50']} / {v['between_tokens_ms_p99']} ms",
        ),
        ("steps", f"{v['steps']:,} with {v['running_mean']} requests on average"),
        ("guesses accepted", f"{v['accepted_guesses']:,} of {v['guesses']:,}"),
        ("memory, peak of capacity", f"{v['peak']:,} of {v['capacity']:,} bytes"),
        ("a static cache reserves", f"{v['static_cache']:,} bytes"),
        ("reserved and unused", f"{v['waste']:.1%}"),
        ("preemptions", f"{v['preemptions']}, {v['swapped']} to the store"),
        ("recomputed tokens", f"{v['recomputed_tokens']:,} of {v['computed_tokens']:,} computed"),
    ):
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
